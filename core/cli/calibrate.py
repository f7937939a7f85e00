"""`errata calibrate`: record what the float pipeline does."""

import argparse
from pathlib import Path
from typing import Any

from errata.cli.columns import read_labels, read_prompts
from errata.cli.output import emit
from errata.cli.usage import Commands, UsageError, add_command, add_seed_option, check_seeds, positive

DETAILS = """\
Runs the pipeline and writes down every call of its denoiser; `errata compress` chooses number ranges
from them. An interrupted run goes on where it stopped: give the same command again.

  errata calibrate core/embedded/digits --steps 25 --samples 64 --out runs/digits/calibration
  errata calibrate google/ddpm-cifar10-32 --steps 100 --samples 512 --out runs/cifar/calibration
  errata calibrate stable-diffusion-v1-5/stable-diffusion-v1-5 --steps 50 --samples 128 --batch-size 4 \\
      --prompts captions.parquet:caption --guidance-scale 7.5 --out runs/sd/calibration

A SOURCE is a text file with one entry a line, FILE:COLUMN of a parquet, CSV or JSON file, or DATASET:COLUMN
on the hub; its first rows are taken, in order, from the split "train".
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
    parser.add_argument("--prompts", metavar="SOURCE", help="one prompt an image, see below")
    parser.add_argument("--labels", metavar="SOURCE", help="one class label an image, see below")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="what guidance leads away from, for every image"
    )
    parser.add_argument(
        "--guidance-scale", type=float, metavar="X", help="of guided pipelines (default: the pipeline's)"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_seeds(args.seed, args.samples)
    prompts = None if args.prompts is None else read_prompts(args.prompts, limit=args.samples)
    inputs = _inputs(args)

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
        inputs=inputs,
        guidance_scale=args.guidance_scale,
        device=args.device,
    )
    payload = {"calibration": str(args.out), "samples": args.samples, "steps": args.steps}
    emit(args, payload, f"{args.samples} trajectories of {args.steps} steps are in {args.out}")
    return 0


def _inputs(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    """What every batch of images is given beside prompts."""
    if args.labels is None and args.negative_prompt is None:
        return None
    starts = range(0, args.samples, args.batch_size)
    sizes = [min(args.batch_size, args.samples - start) for start in starts]
    inputs: list[dict[str, Any]] = [{} for _ in sizes]
    if args.labels is not None:
        labels = read_labels(args.labels, limit=args.samples)
        if len(labels) < args.samples:
            raise UsageError(
                f"`{args.labels}` has {len(labels)} labels, --samples {args.samples} are needed; give more "
                "labels, or lower --samples"
            )
        for batch, start, size in zip(inputs, starts, sizes, strict=True):
            batch["class_labels"] = labels[start : start + size]
    if args.negative_prompt is not None:
        for batch, size in zip(inputs, sizes, strict=True):
            batch["negative_prompt"] = [args.negative_prompt] * size
    return inputs
