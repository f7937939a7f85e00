"""`errata calibrate`: record what the float pipeline does."""

import argparse
from pathlib import Path

from errata.cli.output import emit
from errata.cli.prompts import read_prompts
from errata.cli.usage import Commands, add_command, add_seed_option, check_seeds, positive

DETAILS = """\
Runs the pipeline and writes down every call of its denoiser; `errata compress` chooses number ranges
from them. An interrupted run goes on where it stopped: give the same command again.

  errata calibrate core/embedded/digits --steps 25 --samples 64 --out runs/digits/calibration
  errata calibrate google/ddpm-cifar10-32 --steps 100 --samples 512 --out runs/cifar/calibration
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "calibrate",
        summary="record the trajectories of a float pipeline",
        details=DETAILS,
    )
    parser.add_argument(
        "pipeline",
        metavar="PIPELINE",
        help="hub name or local folder of a diffusers pipeline, as core/embedded/digits of the checkout",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the recording")
    parser.add_argument(
        "--steps", type=positive, default=100, metavar="N", help="sampling steps (default: 100)"
    )
    parser.add_argument(
        "--samples", type=positive, default=512, metavar="N", help="images to make (default: 512)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images per batch (default: 64)",
    )
    add_seed_option(parser)
    parser.add_argument(
        "--prompts", metavar="SOURCE", help="text file with one prompt a line, or DATASET:COLUMN on the hub"
    )
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="for pipelines that take prompts")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_seeds(args.seed, args.samples)
    prompts = None if args.prompts is None else read_prompts(args.prompts, limit=args.samples)

    from errata import calibration

    pipe = calibration.load_pipeline(args.pipeline)
    calibration.collect(
        pipe,
        args.out,
        num_inference_steps=args.steps,
        num_samples=args.samples,
        batch_size=args.batch_size,
        seed=args.seed,
        prompts=prompts,
        guidance_scale=args.guidance_scale,
        device=args.device,
    )
    payload = {"calibration": str(args.out), "samples": args.samples, "steps": args.steps}
    emit(args, payload, f"{args.samples} trajectories of {args.steps} steps are in {args.out}")
    return 0
