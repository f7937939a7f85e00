"""`errata calibrate`: record what the float pipeline does."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from errata.cli.columns import read_labels, read_prompts
from errata.cli.inputs import check_argument, check_labels, needs
from errata.cli.output import emit
from errata.cli.usage import (
    Commands,
    UsageError,
    add_batch_size_option,
    add_command,
    add_device_option,
    add_seed_option,
    check_seeds,
    finite,
    positive,
)

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
# Option: argument of the pipeline.
CONDITIONS = {
    "--prompts": "prompt",
    "--labels": "class_labels",
    "--negative-prompt": "negative_prompt",
    "--guidance-scale": "guidance_scale",
}


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
    add_batch_size_option(parser, default=64)
    add_seed_option(parser)
    parser.add_argument("--prompts", metavar="SOURCE", help="one prompt an image, see below")
    parser.add_argument("--labels", metavar="SOURCE", help="one class label an image, see below")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="what guidance leads away from, for every image"
    )
    parser.add_argument(
        "--guidance-scale", type=finite, metavar="X", help="of guided pipelines (default: the pipeline's)"
    )
    add_device_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_seeds(args.seed, args.samples)
    prompts = None if args.prompts is None else read_prompts(args.prompts, limit=args.samples)
    labels = None if args.labels is None else read_labels(args.labels, limit=args.samples)
    _check_count(args, "prompts", prompts)
    _check_count(args, "labels", labels)

    from errata import calibration

    pipe = calibration.load_pipeline(args.pipeline)
    _check_conditions(pipe, args, labels)
    calibration.collect(
        pipe,
        args.out,
        num_inference_steps=args.steps,
        num_samples=args.samples,
        batch_size=args.batch_size,
        seed=args.seed,
        prompts=prompts,
        inputs=_inputs(args, labels),
        guidance_scale=args.guidance_scale,
        device=args.device or _usual_device(),
    )
    payload = {"calibration": str(args.out), "samples": args.samples, "steps": args.steps}
    emit(args, payload, f"{args.samples} trajectories of {args.steps} steps are in {args.out}")
    return 0


def _usual_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_count(args: argparse.Namespace, what: str, values: Sequence[Any] | None) -> None:
    if values is not None and len(values) < args.samples:
        raise UsageError(
            f"`{getattr(args, what)}` has {len(values)} {what}, --samples {args.samples} need one each; give "
            f"more {what}, or lower --samples"
        )


def _check_conditions(pipe: Any, args: argparse.Namespace, labels: Sequence[int] | None) -> None:
    """Refuse, before any work, options that the pipeline has no use for, and name what is missing.

    Raises:
        UsageError: naming the option.
    """
    if "image" in needs(pipe):
        raise UsageError(
            f"this {type(pipe).__name__} needs a picture for every image, which this command cannot give; "
            "record it from Python: errata.calibration.collect(pipe, …, inputs=[{'image': …}, …])"
        )
    for flag, argument in CONDITIONS.items():
        is_given = getattr(args, flag.removeprefix("--").replace("-", "_")) is not None
        check_argument(pipe, argument, flag=flag, is_given=is_given)
    check_labels(pipe, labels or ())


def _inputs(args: argparse.Namespace, labels: Sequence[int] | None) -> list[dict[str, Any]] | None:
    """What every batch of images is given beside prompts."""
    if labels is None and args.negative_prompt is None:
        return None
    inputs: list[dict[str, Any]] = []
    for start in range(0, args.samples, args.batch_size):
        size = min(args.batch_size, args.samples - start)
        given: dict[str, Any] = {}
        if labels is not None:
            given["class_labels"] = list(labels[start : start + size])
        if args.negative_prompt is not None:
            given["negative_prompt"] = [args.negative_prompt] * size
        inputs.append(given)
    return inputs
