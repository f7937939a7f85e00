"""`errata calibrate`: record the denoiser calls of a float pipeline."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.conditions import (
    SOURCES_TOLD,
    add_condition_options,
    check_conditions,
    inputs_of_batches,
    read_conditions,
)
from errata.cli.output import emit
from errata.cli.usage import (
    Commands,
    UsageError,
    add_batch_size_option,
    add_command,
    add_device_option,
    add_seed_option,
    check_seeds,
    is_first_process,
    misuse,
    positive,
    usual_device,
)
from errata.errors import CalibrationError

if TYPE_CHECKING:
    from errata.calibration import Shard

DETAILS = f"""\
Runs the pipeline and records the inputs of every denoiser call. `errata compress` derives number ranges,
rounding and cache schedules from them. To resume an interrupted run, give the same command again.

  errata calibrate core/embedded/digits --steps 25 --samples 64 --out runs/digits/calibration
  errata calibrate google/ddpm-cifar10-32 --steps 100 --samples 512 --out runs/cifar/calibration
  errata calibrate stable-diffusion-v1-5/stable-diffusion-v1-5 --steps 50 --samples 128 --batch-size 4 \\
      --prompts captions.parquet:caption --guidance-scale 7.5 --out runs/sd/calibration

To use several processes, start it as `torchrun --nproc-per-node 4 -m errata.cli calibrate …`, or with
`accelerate launch` on GPUs. For independent jobs, give each one of --shard 0/16 to 15/16, then merge them:

  errata calibrate --merge runs/cifar/calibration --out runs/cifar/calibration

{SOURCES_TOLD}
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "calibrate",
        summary="record what a float pipeline computes while it samples",
        details=DETAILS,
    )
    parser.add_argument(
        "pipeline",
        nargs="?",
        metavar="PIPELINE",
        help="hub name or local folder of a diffusers pipeline, such as core/embedded/digits",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--steps",
        type=positive,
        default=100,
        metavar="N",
        help="sampling steps, as you will sample later (default: 100)",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=512,
        metavar="N",
        help="trajectories to record (default: 512)",
    )
    add_batch_size_option(parser, default=64)
    add_seed_option(parser)
    add_condition_options(parser)
    add_device_option(parser)
    group = parser.add_argument_group("many processes")
    group.add_argument(
        "--shard", metavar="I/N", help="record shard I of N, counted from 0, without finishing the set"
    )
    group.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="make the set of the shards in these directories; takes no PIPELINE",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.merge:
        return _merge(args)
    if args.pipeline is None:
        raise UsageError("PIPELINE is missing; give a hub name or a folder, or --merge DIR")
    shard = _shard(args)
    check_seeds(args.seed, args.samples)
    conditions = read_conditions(args, args.samples)

    from errata import calibration

    pipe = calibration.load_pipeline(args.pipeline)
    check_conditions(pipe, args, conditions)
    given: dict[str, Any] = {
        "num_inference_steps": args.steps,
        "num_samples": args.samples,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "prompts": conditions.prompts,
        "inputs": inputs_of_batches(args, conditions, samples=args.samples, batch_size=args.batch_size),
        "guidance_scale": args.guidance_scale,
        "device": args.device or usual_device(),
    }
    if shard is None:
        calibration.calibrate(pipe, args.out, **given)
        _tell_set(args, samples=args.samples, steps=args.steps)
    else:
        calibration.record_share(pipe, args.out, shard=shard, **given)
        _tell_share(args, shard)
    return 0


def _shard(args: argparse.Namespace) -> "Shard | None":
    if args.shard is None:
        return None

    from errata.calibration import Shard

    with misuse(CalibrationError):
        return Shard.parse(args.shard)


def _merge(args: argparse.Namespace) -> int:
    if args.pipeline is not None or args.shard is not None:
        raise UsageError("--merge reads recorded shards only; leave out PIPELINE and --shard")

    from errata import calibration

    merged = calibration.merge(args.merge, args.out)
    _tell_set(args, samples=merged.num_samples, steps=merged.num_inference_steps)
    return 0


def _tell_set(args: argparse.Namespace, *, samples: int, steps: int) -> None:
    if is_first_process():
        payload = {"calibration": str(args.out), "samples": samples, "steps": steps}
        emit(args, payload, f"calibration: {args.out}, {samples} trajectories of {steps} steps")


def _tell_share(args: argparse.Namespace, shard: "Shard") -> None:
    if is_first_process():
        text = f"shard {shard} is recorded in {args.out}; make the set with errata calibrate --merge DIR"
        emit(args, {"shard": str(shard), "out": str(args.out)}, text)
