"""The images of equal seeds as the page shows them: by artifact, one PNG strip for each row."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from errata.quality.pixels import to_bytes
from errata.report.results import FLOAT, Report, Row

Strips = Mapping[tuple[str, str], bytes]
"""PNG strip of the first seeds by artifact and plan; the float model's under `("float", "none")`."""

# Shown height of one image, in CSS pixels; small images are enlarged by a whole factor.
_TILE = 64


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Pixels of one image: in the file, and in the page's grid."""

    width: int
    gap: int
    shown_height: int
    shown_gap: int
    is_enlarged: bool


@dataclass(frozen=True, kw_only=True)
class Film:
    """A strip and its name; `uri` is empty if an earlier group of the page holds the same strip."""

    row: Row
    label: str
    uri: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The strips of one artifact, the float model's first."""

    title: str
    films: tuple[Film, ...]


def tile_of(report: Report) -> Tile:
    """Return how large an image is in the grid."""
    height, width, _ = report.protocol.image_size
    zoom = max(1, round(_TILE / height)) if height <= _TILE else _TILE * 2 / height
    return Tile(
        width=width,
        gap=gap_of(width),
        shown_height=round(height * zoom),
        shown_gap=round(gap_of(width) * zoom),
        is_enlarged=zoom > 1,
    )


def groups_of(report: Report, strips: Strips) -> list[Group]:
    """Return a group for each artifact, and one for the float model if it also ran with fewer steps."""
    shown: set[tuple[str, str]] = set()
    groups = []
    float_row = [report.float_row] if report.float_row is not None else []
    for artifact in report.artifacts:
        groups.append(_group(artifact, [*float_row, *report.of(artifact)], strips, shown))
    if sum(row.is_float for row in report.rows) > 1:
        groups.append(_group("float model", list(report.of(FLOAT)), strips, shown))
    return [group for group in groups if group.films]


def _group(title: str, rows: list[Row], strips: Strips, shown: set[tuple[str, str]]) -> Group:
    films = []
    for row in rows:
        key = row.artifact, row.plan
        if key in strips:
            films.append(Film(row=row, label=_label(row), uri="" if key in shown else data_uri(strips[key])))
            shown.add(key)
    return Group(title=title, films=tuple(films))


def _label(row: Row) -> str:
    if row.is_float and not row.is_alternative:
        return "float model"
    return "uncorrected" if row.verdict.kind == "uncorrected" else row.plan


def strip(images: Tensor) -> bytes:
    """Return a PNG of images (N, C, H, W), C 1 or 3, in [0, 1], side by side with transparent gaps."""
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels; a picture needs 1 or 3")
    gap = gap_of(width)
    canvas = torch.zeros(channels + 1, height, count * (width + gap) - gap, dtype=torch.uint8)
    for index, image in enumerate(images):
        left = index * (width + gap)
        canvas[:channels, :, left : left + width] = to_bytes(image)
        canvas[channels, :, left : left + width] = 255
    picture = Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy(), "LA" if channels == 1 else "RGBA")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def gap_of(width: int) -> int:
    """Return the pixels between two images."""
    return max(1, width // 16)


def data_uri(png: bytes) -> str:
    """Return the PNG as a `data:` URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
