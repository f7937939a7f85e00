"""Images on disk, and a sheet of all of them."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def save_pictures(images: Sequence[Image.Image], folder: Path) -> None:
    """Write `00000.png`, `00001.png`, ... and `grid.png` into a folder."""
    for index, image in enumerate(images):
        image.save(folder / f"{index:05d}.png")
    contact_sheet(images).save(folder / "grid.png")


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All images, of one size and mode, in rows that make the sheet about as wide as it is high."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    sheet = Image.new(images[0].mode, (columns * width, rows * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
