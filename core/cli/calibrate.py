"""`errata calibrate`: record the denoiser calls of a float pipeline."""

import argparse
from pathlib import Path

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
    add_batch_size_option,
    add_command,
    add_device_option,
    add_seed_option,
    check_seeds,
    positive,
    usual_device,
)

DETAILS = f"""\
Runs the pipeline and records the inputs of every denoiser call. `errata compress` derives number ranges,
rounding and cache schedules from them. To resume an interrupted run, give the same command again.

  errata calibrate core/embedded/digits --steps 25 --samples 64 --out runs/digits/calibration
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_seeds(args.seed, args.samples)
    conditions = read_conditions(args, args.samples)

    from errata import calibration

    pipe = calibration.load_pipeline(args.pipeline)
    check_conditions(pipe, args, conditions)
    calibration.calibrate(
        pipe,
        args.out,
        num_inference_steps=args.steps,
        num_samples=args.samples,
        batch_size=args.batch_size,
        seed=args.seed,
        prompts=conditions.prompts,
        inputs=inputs_of_batches(args, conditions, samples=args.samples, batch_size=args.batch_size),
        guidance_scale=args.guidance_scale,
        device=args.device or usual_device(),
    )
    payload = {"calibration": str(args.out), "samples": args.samples, "steps": args.steps}
    emit(args, payload, f"calibration: {args.out}, {args.samples} trajectories of {args.steps} steps")
    return 0
