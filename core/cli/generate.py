"""`errata generate`: images from an artifact, with or without correction."""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.conditions import check_count
from errata.cli.input_images import IMAGES_TOLD, InputImages, add_image_options, check_size, read_images
from errata.cli.inputs import call_arguments, rejections_as_errors
from errata.cli.output import emit
from errata.cli.plan_files import auto_plan, chosen_text, is_auto
from errata.cli.plans import (
    add_plan_options,
    add_sheet_option,
    plan_from,
    with_sheet,
)
from errata.cli.startup import lean_imports
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

DETAILS = f"""\
Writes 00000.png, 00001.png, ... and grid.png, which shows all images. Image i has seed N + i, so it does not
depend on the number of images.

  errata generate runs/cifar/artifact --images 16 --correct iec --at ends:1/10 --out runs/cifar/images
  errata generate runs/sd/artifact --prompt "a red bicycle" --guidance-scale 7.5 --out runs/sd/images

{IMAGES_TOLD}
"""
# In pixels: the least side of an image on the grid, and the gap between two images.
VISIBLE, GUTTER = 64, 2


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "generate",
        summary="make images from an artifact",
        details=DETAILS,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="artifact or engine")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the images")
    parser.add_argument(
        "--images", type=positive, default=16, metavar="N", help="number of images (default: 16)"
    )
    add_batch_size_option(parser, default=16)
    add_seed_option(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="prompt, for text models")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the images should not show")
    parser.add_argument("--label", type=int, metavar="N", help="class label, for class-conditional models")
    parser.add_argument("--image", type=Path, metavar="FILE", help="input image, the same for all images")
    add_image_options(parser)
    parser.add_argument(
        "--guidance-scale", type=finite, metavar="X", help="guidance scale (default: the pipeline's)"
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="sampling steps (default: as calibrated)")
    parser.add_argument(
        "--on-mismatch",
        choices=("error", "nearest"),
        default="error",
        help="for --steps that were not calibrated: stop with an error, or use the ranges of the nearest "
        "calibrated steps (default: error)",
    )
    add_device_option(parser)
    add_backend_option(parser)
    add_sheet_option(parser.add_argument_group("sheet"))
    add_plan_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_seeds(args.seed, args.images)
    with lean_imports(args, args.artifact):
        import errata.deploy.assembly  # noqa: F401 - all that loading imports
        from errata.correct import wrap
        from errata.deploy import load
    from errata.directories import staged_directory
    from errata.errors import ErrataError

    chooses = is_auto(args)
    plan = None if chooses else with_sheet(plan_from(args), args.sheet)
    given = _input_images(args)

    with staged_directory(args.out, error=ErrataError) as folder:
        deployed = load(args.artifact, args.device, args.backend, args.on_mismatch)
        recorded = deployed.num_inference_steps
        if args.on_mismatch == "nearest" and args.steps is not None:
            deployed = deployed.at_steps(args.steps)
        if not sys.stderr.isatty():  # diffusers passes `disable` itself, so TQDM_DISABLE does not reach it
            deployed.pipe.set_progress_bar_config(disable=True)
        arguments = _arguments(deployed.pipe, args, given)
        if plan is None:
            plan = auto_plan(args.artifact, deployed, arguments, sheet=args.sheet)
        tally = _Tally()
        images = _make_images(wrap(deployed, plan), args, arguments, tally)
        save_images(images, folder)
    lines = [tally.summary(), f"{len(images)} images and grid.png are in {args.out}"]
    if deployed.num_inference_steps != recorded:
        lines.insert(
            0,
            f"{args.steps} steps with the ranges of the nearest of {recorded} calibrated steps; how that "
            "affects quality has not been measured",
        )
    if chooses:
        lines.insert(0, f"auto chose: {chosen_text(plan, args.sheet)}")
    emit(args, {"images": len(images), "out": str(args.out), **tally.to_json()}, "\n".join(lines))
    return 0


def _input_images(args: argparse.Namespace) -> InputImages | None:
    """Return one input image for each image, or None.

    Raises:
        UsageError: there are too few, or `--image` is given as well; or as `read_images`.
    """
    if args.image is not None and args.input_images is not None:
        raise UsageError("--image and --input-images both give input images; leave one of them out")
    given = read_images(args, args.images)
    if given is not None:
        check_count(
            args.input_images, "input images", len(given.images), args.images, told=f"--images {args.images}"
        )
    return given


def _arguments(
    pipe: Any, args: argparse.Namespace, given: InputImages | None
) -> Callable[[range], dict[str, Any]]:
    """Return a function that maps image numbers to the pipeline's keyword arguments, without generators."""
    same = call_arguments(pipe, args)
    if given is None:
        return lambda indices: same(len(indices))
    check_size(pipe, given)
    return lambda indices: {**same(len(indices)), **given.arguments(indices)}


def _make_images(
    pipeline: "CorrectedPipeline",
    args: argparse.Namespace,
    arguments: Callable[[range], dict[str, Any]],
    tally: "_Tally",
) -> "list[Image]":
    images: list[Image] = []
    seeds = range(args.seed, args.seed + args.images)
    for start in range(0, args.images, args.batch_size):
        batch = seeds[start : start + args.batch_size]
        with rejections_as_errors(pipeline.deployed.pipe):
            output = pipeline(**arguments(range(start, start + len(batch))), generator=_generators(batch))
        if not hasattr(output, "images"):
            raise UsageError(
                "this model does not make images; run it from Python: errata.deploy.load(path)(prompt=…)"
            )
        images += output.images
        tally.add(pipeline)
    return images


def _generators(seeds: Sequence[int]) -> "list[torch.Generator]":
    """Return a generator for each image, on the CPU, so that a seed gives the same noise on every device."""
    import torch

    return [torch.Generator().manual_seed(seed) for seed in seeds]


class _Tally:
    """Denoiser calls and overhead per image, over all batches."""

    def __init__(self) -> None:
        self.images = 0
        self.evaluations: defaultdict[str, float] = defaultdict(float)
        self.overhead = 0.0

    def add(self, pipeline: "CorrectedPipeline") -> None:
        stats = pipeline.stats
        self.images += stats.batch_size
        for kind, count in stats.evaluations.items():
            self.evaluations[kind] += count * stats.batch_size
        if stats.extra:  # else the overhead is 0, and measuring what a call costs takes time
            self.overhead += pipeline.overhead() * stats.batch_size

    def to_json(self) -> dict[str, Any]:
        evaluations = {kind: count / self.images for kind, count in self.evaluations.items()}
        return {"evaluations_per_image": evaluations, "overhead": self.overhead / self.images}

    def summary(self) -> str:
        counts = [f"{count / self.images:.4g} {kind}" for kind, count in self.evaluations.items()]
        summary = f"denoiser calls per image: {' + '.join(counts)}"
        return f"{summary}, overhead {self.overhead / self.images:.1%}" if self.overhead else summary


def save_images(images: "Sequence[Image]", folder: Path) -> None:
    """Write `00000.png`, `00001.png`, ... and `grid.png` into a folder."""
    for index, image in enumerate(images):
        image.save(folder / f"{index:05d}.png")
    image_sheet(images).save(folder / "grid.png")


def image_sheet(images: "Sequence[Image]") -> "Image":
    """Return one image that shows all, which have one size and mode, in about as many rows as columns.

    Small images are enlarged by a whole factor, pixel by pixel.
    """
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    factor = math.ceil(VISIBLE / min(images[0].size))
    width, height = (factor * side for side in images[0].size)
    across, down = width + GUTTER, height + GUTTER
    sheet = Image.new(images[0].mode, (columns * across - GUTTER, rows * down - GUTTER))
    for index, image in enumerate(images):
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (index % columns * across, index // columns * down))
    return sheet
