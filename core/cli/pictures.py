"""Images on disk, and a sheet of all of them."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

# In pixels: the least side of an image on a sheet, and the gap between two.
VISIBLE = 64
GUTTER = 2


def save_pictures(images: Sequence[Image.Image], folder: Path) -> None:
    """Write `00000.png`, `00001.png`, ... and `grid.png` into a folder."""
    for index, image in enumerate(images):
        image.save(folder / f"{index:05d}.png")
    contact_sheet(images).save(folder / "grid.png")


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All images, of one size and mode, in rows that make the sheet about as wide as it is high.

    Small ones are enlarged by a whole factor, pixel by pixel, until they can be seen.
    """
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
