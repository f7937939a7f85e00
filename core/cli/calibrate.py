"""`errata calibrate`: record the denoiser calls of a float pipeline."""

import argparse
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
    positive,
    usual_device,
)
from errata.errors import CalibrationError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from errata.calibration import CalibrationEstimate
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.out is None and not args.dry_run:
        raise UsageError("the following arguments are required: --out; see `errata calibrate --help`")
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
    estimate = _estimate(args, pipe, conditions, sizes)
    if args.dry_run:
        emit(args, estimate.to_json(), estimate_text(estimate))
        return 0
    announce(estimate)
    estimate.check(error=CalibrationError)
    _calibrate(args, pipe, conditions, estimate)
    payload = {"calibration": str(args.out), "samples": estimate.num_samples, "steps": args.steps}
    emit(args, payload, f"calibration: {args.out}, {estimate.num_samples} trajectories of {args.steps} steps")
    return 0


def _conditions(args: argparse.Namespace, samples: int) -> Conditions:
    check_seeds(args.seed, samples)
    return read_conditions(args, samples)


def _estimate(
    args: argparse.Namespace, pipe: "DiffusionPipeline", conditions: Conditions, sizes: "Sizes"
) -> "CalibrationEstimate":
    from errata import calibration

    return calibration.estimate(
        pipe,
        args.out,
        num_samples=args.samples,
        batch_size=args.batch_size,
        preset=args.preset,
        inputs=inputs_of_batches(args, conditions, samples=sizes.num_samples, batch_size=sizes.batch_size),
        **_arguments(args, conditions),
    )


def _calibrate(
    args: argparse.Namespace,
    pipe: "DiffusionPipeline",
    conditions: Conditions,
    estimate: "CalibrationEstimate",
) -> None:
    from errata import calibration

    samples, batch_size = estimate.num_samples, estimate.batch_size
    calibration.calibrate(
        pipe,
        args.out,
        num_samples=samples,
        batch_size=batch_size,
        inputs=inputs_of_batches(args, conditions, samples=samples, batch_size=batch_size),
        **_arguments(args, conditions),
    )


def _arguments(args: argparse.Namespace, conditions: Conditions) -> dict[str, Any]:
    """Return what a calibration and its estimate are both given."""
    return {
        "num_inference_steps": args.steps,
        "seed": args.seed,
        "prompts": conditions.prompts,
        "guidance_scale": args.guidance_scale,
        "device": args.device or usual_device(),
    }
