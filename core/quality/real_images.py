"""Real images streamed from a folder or a dataset: of one size, never resized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from errata.errors import ReportError, first_line

_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
_BATCH_SIZE = 64
_ALLOWED = (
    "a hub name, a directory that Dataset.save_to_disk wrote, or a directory of parquet files or of images "
    "that `datasets` reads"
)


@dataclass(frozen=True)
class RealImage:
    """One image, and its name for error messages."""

    name: str
    pixels: Image.Image


def folder_images(folder: Path) -> Iterator[RealImage]:
    """Return all PNG and JPEG files under a folder, sorted by path; each is opened when it is needed.

    Raises:
        ReportError: no folder, or fewer than two images; before any is opened.
    """
    if not folder.is_dir():
        raise ReportError(f"image folder `{folder}` does not exist")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if len(paths) < 2:
        raise ReportError(
            f"image folder `{folder}` holds {len(paths)} PNG or JPEG files; at least 2 are needed"
        )
    return (_opened(path) for path in paths)


def dataset_images(
    name_or_path: str, column: str, *, split: str = "train", limit: int | None = None
) -> Iterator[RealImage]:
    """Yield the first `limit` images, or all, of a column of a dataset.

    Raises:
        ReportError: the dataset cannot be read, has no such column, or a row of it holds no image.
    """
    rows = islice(_open_dataset(name_or_path, split), limit)
    while (row := _next_row(rows, name_or_path)) is not None:
        yield _from_row(row, column, f"{name_or_path}:{column}")


def image_batches(images: Iterator[RealImage], *, grey: bool) -> Iterator[Tensor]:
    """Yield batches (B, C, H, W), float32 in [0, 1], of images of one size; C is 1 if `grey`, else 3.

    Raises:
        ReportError: an image is of another size than the first, or cannot be decoded.
    """
    first: tuple[str, tuple[int, int]] | None = None
    while chunk := list(islice(images, _BATCH_SIZE)):
        for image in chunk:
            first = first or (image.name, image.pixels.size)
            if image.pixels.size != first[1]:
                width, height = image.pixels.size
                raise ReportError(
                    f"image `{image.name}` is {width}x{height}, `{first[0]}` is "
                    f"{first[1][0]}x{first[1][1]}; a reference needs images of one size"
                )
        yield torch.stack([_to_tensor(image, grey=grey) for image in chunk])


def _opened(path: Path) -> RealImage:
    try:
        with Image.open(path) as opened:
            opened.load()
            return RealImage(str(path), opened.copy())
    except (OSError, UnidentifiedImageError) as problem:
        raise ReportError(f"image `{path}` cannot be read: {problem}") from problem


def _to_tensor(image: RealImage, *, grey: bool) -> Tensor:
    """Return (C, H, W), float32 in [0, 1]."""
    try:
        pixels = np.array(image.pixels.convert("L" if grey else "RGB"), dtype=np.float32)
    except (OSError, ValueError) as problem:
        raise ReportError(f"image `{image.name}` cannot be read: {problem}") from problem
    tensor = torch.from_numpy(pixels / 255)
    return tensor.unsqueeze(0) if grey else tensor.permute(2, 0, 1).contiguous()


def _open_dataset(name_or_path: str, split: str) -> Any:
    import datasets

    try:
        if (Path(name_or_path) / "dataset_dict.json").is_file() or (
            Path(name_or_path) / "state.json"
        ).is_file():
            stored = datasets.load_from_disk(name_or_path)
            return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        return datasets.load_dataset(name_or_path, split=split, streaming=True)
    except Exception as problem:  # datasets, its readers and the hub raise whatever they like
        raise ReportError(
            f"dataset `{name_or_path}`, split `{split}`, cannot be read: {first_line(problem)}; allowed are "
            f"{_ALLOWED}"
        ) from problem


def _next_row(rows: Iterator[dict[str, Any]], name: str) -> dict[str, Any] | None:
    try:
        return next(rows, None)
    except Exception as problem:  # readers, decoders and the hub raise whatever they like
        raise ReportError(f"dataset `{name}` cannot be read further: {first_line(problem)}") from problem


def _from_row(row: dict[str, Any], column: str, name: str) -> RealImage:
    if column not in row:
        raise ReportError(
            f"dataset `{name.rpartition(':')[0]}` has no column `{column}`; it has {', '.join(row)}"
        )
    value = row[column]
    if isinstance(value, dict) and isinstance(
        value.get("bytes"), bytes
    ):  # parquet that `datasets` did not write
        value = _decoded(value["bytes"], name)
    if not isinstance(value, Image.Image):
        raise ReportError(
            f"`{name}` holds a {type(value).__name__}, which is not an image; choose another column"
        )
    return RealImage(name, value)


def _decoded(content: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(BytesIO(content))
        image.load()
    except (OSError, UnidentifiedImageError) as problem:
        raise ReportError(f"`{name}` holds an image that cannot be read: {problem}") from problem
    return image
