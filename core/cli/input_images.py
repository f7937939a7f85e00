"""One input image for each sample, and its mask: files of two folders, checked before any work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.inputs import parameters
from errata.cli.usage import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES_TOLD = """\
The files of --input-images are used in the order of their paths, one for each image, and have one size. Where
the model cannot take that size, its pipeline resizes them, and the command says to what."""
# What declares an option: a parser, or a group of its options.
Parser = argparse._ActionsContainer
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


def add_image_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--input-images",
        type=Path,
        metavar="DIR",
        help="folder of PNG or JPEG files, one input image for each image: for upscalers and inpainting",
    )
    parser.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="folder of masks, one for each input image and of the same name: white is painted anew",
    )


@dataclass(frozen=True)
class InputImages:
    """The input images of a command.

    Attributes:
        images: files, in the order of the samples.
        masks: a file for each image, or None.
        size: width and height of all of them, in pixels.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...] | None
    size: tuple[int, int]

    def arguments(self, indices: range) -> dict[str, list[Image]]:
        """Return the pipeline's arguments for some samples; after the last image the first one is next."""
        places = [index % len(self.images) for index in indices]
        given = {"image": [open_image(self.images[place], mode="RGB") for place in places]}
        if self.masks is not None:
            given["mask_image"] = [open_image(self.masks[place], mode="L") for place in places]
        return given


def read_images(args: argparse.Namespace, count: int) -> InputImages | None:
    """Return the first `count` input images, or all if there are fewer; None without `--input-images`.

    Raises:
        UsageError: a folder does not exist or is empty, a file cannot be read as an image, an image has no
            mask, or the sizes differ.
    """
    if args.input_images is None:
        if args.masks is not None:
            raise UsageError("--masks has no effect without --input-images, one image for each mask; add it")
        return None
    found = files_in(args.input_images, flag="--input-images")[:count]
    masks = None if args.masks is None else _masks_of(found, args.input_images, args.masks)
    first, size = found[0], open_image(found[0], mode="RGB").size
    for path in (*found, *(masks or ())):
        if (other := open_image(path, mode="RGB").size) != size:
            raise UsageError(
                f"`{path}` has {_spelled(other)} pixels and `{first}` has {_spelled(size)}; input images and "
                "masks need one size: resize or crop them"
            )
    return InputImages(tuple(found), None if masks is None else tuple(masks), size)


def files_in(folder: Path, *, flag: str) -> list[Path]:
    """Return the PNG and JPEG files under a folder, sorted by path.

    Raises:
        UsageError: there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise UsageError(f"{flag} `{folder}` is not a folder; give one that holds PNG or JPEG files")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise UsageError(f"{flag} `{folder}` has no PNG or JPEG file; give a folder with one for each image")
    return found


def _masks_of(images: Sequence[Path], folder: Path, masks: Path) -> list[Path]:
    """Return the mask of each image: the file with the same path and name, in any of the formats.

    Raises:
        UsageError: an image has none, or several.
    """
    by_name: dict[Path, list[Path]] = {}
    for path in files_in(masks, flag="--masks"):
        by_name.setdefault(path.relative_to(masks).with_suffix(""), []).append(path)
    chosen = []
    for image in images:
        name = image.relative_to(folder).with_suffix("")
        found = by_name.get(name, [])
        if len(found) != 1:
            trouble = "no mask" if not found else f"{len(found)} masks"
            raise UsageError(f"--masks `{masks}` has {trouble} for `{image}`; keep one, named `{name}.png`")
        chosen += found
    return chosen


def open_image(path: Path, *, mode: str) -> Image:
    """Return the pixels of a file, in this mode.

    Raises:
        UsageError: it cannot be read as an image.
    """
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return opened.convert(mode)
    # Pillow raises these two for files that are damaged or too large.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise UsageError(
            f"`{path}` cannot be opened as an image ({problem}); give a PNG or JPEG file"
        ) from problem


def check_size(pipe: Any, given: InputImages) -> None:
    """Say on stderr to what size the pipeline brings the images, if to another one.

    Raises:
        UsageError: nothing would be left of them.
    """
    used = size_in_use(pipe, given.size)
    name = type(pipe).__name__
    if 0 in used:
        least = pipe.vae_scale_factor
        raise UsageError(
            f"the input images have {_spelled(given.size)} pixels, and {name} needs at least "
            f"{_spelled((least, least))}; give larger images"
        )
    if used != given.size:
        print(
            f"errata: {name} resizes the input images from {_spelled(given.size)} to {_spelled(used)} pixels",
            file=sys.stderr,
        )


def size_in_use(pipe: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height that a pipeline brings input images to; `size` if that is not known."""
    from diffusers.image_processor import VaeImageProcessor

    factor, taken = getattr(pipe, "vae_scale_factor", None), set(parameters(pipe))
    if factor is None or type(getattr(pipe, "image_processor", None)) is not VaeImageProcessor:
        return size
    if {"height", "mask_image"} <= taken:  # inpainting: the size that the model was made for
        side = pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return width * factor, height * factor
    if "height" in taken:
        return size
    return size[0] - size[0] % factor, size[1] - size[1] % factor


def _spelled(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
