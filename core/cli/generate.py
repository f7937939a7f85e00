"""`errata generate`: images from an artifact, corrected or not."""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.inputs import call_arguments, refusals_told
from errata.cli.output import emit
from errata.cli.plans import add_plan_options, plan_from
from errata.cli.usage import (
    Commands,
    UsageError,
    add_backend_option,
    add_batch_size_option,
    add_command,
    add_device_option,
    add_seed_option,
    check_seeds,
    finite,
    positive,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from errata.correct import CorrectedPipeline

DETAILS = """\
Writes 00000.png, 00001.png, ... and grid.png, a sheet of all. Image i starts from seed N + i, so it does
not depend on how many are asked for.

  errata generate runs/cifar/artifact --images 16 --correct iec --at ends:1/10 --out runs/cifar/images
  errata generate runs/sd/artifact --prompt "a red bicycle" --guidance-scale 7.5 --out runs/sd/images
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "generate",
        summary="make images with an artifact",
        details=DETAILS,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what `errata deploy` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the images")
    parser.add_argument("--images", type=positive, default=16, metavar="N", help="how many (default: 16)")
    add_batch_size_option(parser, default=16)
    add_seed_option(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="for models that take one")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--label", type=int, metavar="N", help="class to draw, for models that take one")
    parser.add_argument("--image", type=Path, metavar="FILE", help="picture to enlarge, for upscalers")
    parser.add_argument(
        "--guidance-scale", type=finite, metavar="X", help="of guided models (default: the pipeline's)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="sampling steps (default: as calibrated)")
    parser.add_argument(
        "--on-mismatch",
        choices=("error", "nearest"),
        default="error",
        help="what --steps does when it was not calibrated for: refuse it, or take the ranges of the nearest "
        "recorded steps (default: error)",
    )
    add_device_option(parser)
    add_backend_option(parser)
    add_plan_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_seeds(args.seed, args.images)
    plan = plan_from(args)

    from errata import correct, deploy
    from errata.cli.pictures import save_pictures
    from errata.directories import staged_directory
    from errata.errors import ErrataError

    with staged_directory(args.out, error=ErrataError) as folder:
        deployed = deploy.load(args.artifact, args.device, args.backend, args.on_mismatch)
        recorded = deployed.num_inference_steps
        if args.on_mismatch == "nearest" and args.steps is not None:
            deployed = deployed.at_steps(args.steps)
        if not sys.stderr.isatty():  # diffusers passes `disable` itself, so TQDM_DISABLE does not reach it
            deployed.pipe.set_progress_bar_config(disable=True)
        tally = _Tally()
        images = _make_images(correct.wrap(deployed, plan), args, tally)
        save_pictures(images, folder)
    lines = [tally.summary(), f"{len(images)} images and grid.png are in {args.out}"]
    if deployed.num_inference_steps != recorded:
        lines.insert(
            0,
            f"{args.steps} steps with the ranges of the nearest of {recorded} recorded ones; what that costs "
            "in quality was never measured",
        )
    emit(args, {"images": len(images), "out": str(args.out), **tally.to_json()}, "\n".join(lines))
    return 0


def _make_images(pipeline: "CorrectedPipeline", args: argparse.Namespace, tally: "_Tally") -> "list[Image]":
    arguments = call_arguments(pipeline.deployed.pipe, args)
    images: list[Image] = []
    seeds = range(args.seed, args.seed + args.images)
    for start in range(0, args.images, args.batch_size):
        batch = seeds[start : start + args.batch_size]
        with refusals_told(pipeline.deployed.pipe):
            output = pipeline(**arguments(len(batch)), generator=_generators(batch))
        if not hasattr(output, "images"):
            raise UsageError(
                "this model makes no images; call it from Python: errata.deploy.load(path)(prompt=…)"
            )
        images += output.images
        tally.add(pipeline)
    return images


def _generators(seeds: Sequence[int]) -> "list[torch.Generator]":
    """One for each image, on the CPU whatever the device, so that a seed means the same noise everywhere."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


class _Tally:
    """Evaluations and overhead of an average image, over batches."""

    def __init__(self) -> None:
        self.images = 0
        self.evaluations: defaultdict[str, float] = defaultdict(float)
        self.overhead = 0.0

    def add(self, pipeline: "CorrectedPipeline") -> None:
        stats = pipeline.stats
        self.images += stats.batch_size
        for kind, count in stats.evaluations.items():
            self.evaluations[kind] += count * stats.batch_size
        if stats.extra:  # measuring what a call costs takes a moment, and would tell nothing
            self.overhead += pipeline.overhead() * stats.batch_size

    def to_json(self) -> dict[str, Any]:
        evaluations = {kind: count / self.images for kind, count in self.evaluations.items()}
        return {"evaluations_per_image": evaluations, "overhead": self.overhead / self.images}

    def summary(self) -> str:
        counts = [f"{count / self.images:.4g} {kind}" for kind, count in self.evaluations.items()]
        corrected = f"{self.overhead / self.images:.1%} more than" if self.overhead else "as"
        return f"denoiser evaluations per image: {' + '.join(counts)}, {corrected} without correction"
