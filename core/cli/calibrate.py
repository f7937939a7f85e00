"""`errata calibrate`: record the denoiser calls of a float pipeline."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.conditions import (
    SOURCES_TOLD,
    Conditions,
    add_condition_options,
    check_conditions,
    inputs_of_batches,
    read_conditions,
)
from errata.cli.output import announce, emit, estimate_text
from errata.cli.usage import (
    Commands,
    UsageError,
    add_command,
    add_device_option,
    add_preset_option,
    add_seed_option,
    check_seeds,
    is_first_process,
    misuse,
    positive,
    usual_device,
)
from errata.errors import CalibrationError
from errata.sharding import launched_processes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from errata.calibration import CalibrationEstimate, Shard
    from errata.calibration.sizes import Sizes

DETAILS = f"""\
Runs the pipeline and records the inputs of every denoiser call. `errata compress` derives number ranges,
rounding and cache schedules from them. To resume an interrupted run, give the same command again.

Before it begins, it says what that will take in time, disk space and memory, from the first calls of the
network, and refuses what cannot fit. --dry-run says it and stops.

  errata calibrate core/embedded/digits --steps 25 --samples 64 --out runs/digits/calibration
  errata calibrate core/embedded/digits --steps 25 --dry-run
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
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory to write")
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
        metavar="N",
        help="trajectories to record (default: 512, fewer for a large network, 16 for Stable Diffusion 1.5)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="images per batch (default: 64, fewer for a large network or in little memory)",
    )
    add_preset_option(
        parser,
        sets="half as many samples, from 8 to 64, in batches of an eighth of the usual size",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what it would take in time, disk space and memory; write nothing",
    )
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
    _check_options(args)
    if args.merge:
        return _merge(args)
    shard = _shard(args)
    # Without --samples their number depends on the pipeline; one of each source is looked at before that.
    conditions = _conditions(args, args.samples or 1)

    from errata import calibration

    pipe = calibration.load_pipeline(args.pipeline)
    check_conditions(pipe, args, conditions)
    sizes = calibration.choose_sizes(
        pipe.unet, num_samples=args.samples, batch_size=args.batch_size, preset=args.preset, out=args.out
    )
    if args.samples is None:
        conditions = _conditions(args, sizes.num_samples)
        check_conditions(pipe, args, conditions)
    estimate = _estimate(args, pipe, conditions, sizes, shard)
    if args.dry_run:
        emit(args, estimate.to_json(), estimate_text(estimate))
        return 0
    if is_first_process():
        announce(estimate)
    estimate.check(error=CalibrationError)
    _calibrate(args, pipe, conditions, estimate, shard)
    if shard is None:
        _tell_set(args, samples=estimate.num_samples, steps=args.steps)
    else:
        _tell_share(args, shard)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    if args.out is None and not args.dry_run:
        raise UsageError("the following arguments are required: --out; see `errata calibrate --help`")
    if args.merge and (args.pipeline is not None or args.shard is not None or args.dry_run):
        raise UsageError("--merge reads recorded shards only; leave out PIPELINE, --shard and --dry-run")
    if not args.merge and args.pipeline is None:
        raise UsageError("PIPELINE is missing; give a hub name or a folder, or --merge DIR")


def _conditions(args: argparse.Namespace, samples: int) -> Conditions:
    check_seeds(args.seed, samples)
    return read_conditions(args, samples)


def _estimate(
    args: argparse.Namespace,
    pipe: "DiffusionPipeline",
    conditions: Conditions,
    sizes: "Sizes",
    shard: "Shard | None",
) -> "CalibrationEstimate":
    """Return what the work takes; of work that is shared, the same numbers in every process."""
    from errata import calibration

    is_shared = shard is not None or launched_processes() > 1
    estimate = calibration.estimate(
        pipe,
        args.out,
        num_samples=sizes.num_samples if is_shared else args.samples,
        batch_size=sizes.batch_size if is_shared else args.batch_size,
        preset=args.preset,
        inputs=inputs_of_batches(args, conditions, samples=sizes.num_samples, batch_size=sizes.batch_size),
        **_arguments(args, conditions),
    )
    if not is_shared:
        return estimate
    chosen = (sizes.reason,) if sizes.reason else ()
    return replace(
        estimate,
        notes=(
            *chosen,
            *estimate.notes,
            "the estimate is for the whole set in one process, not for a share of it",
        ),
    )


def _calibrate(
    args: argparse.Namespace,
    pipe: "DiffusionPipeline",
    conditions: Conditions,
    estimate: "CalibrationEstimate",
    shard: "Shard | None",
) -> None:
    from errata import calibration

    samples, batch_size = estimate.num_samples, estimate.batch_size
    given = {
        "num_samples": samples,
        "batch_size": batch_size,
        "inputs": inputs_of_batches(args, conditions, samples=samples, batch_size=batch_size),
        **_arguments(args, conditions),
    }
    if shard is None:
        calibration.calibrate(pipe, args.out, **given)
    else:
        calibration.record_share(pipe, args.out, shard=shard, **given)


def _arguments(args: argparse.Namespace, conditions: Conditions) -> dict[str, Any]:
    """Return what a calibration and its estimate are both given."""
    return {
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "prompts": conditions.prompts,
        "guidance_scale": args.guidance_scale,
        "device": args.device or usual_device(),
    }


def _shard(args: argparse.Namespace) -> "Shard | None":
    if args.shard is None:
        return None

    from errata.calibration import Shard

    with misuse(CalibrationError):
        return Shard.parse(args.shard)


def _merge(args: argparse.Namespace) -> int:
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
