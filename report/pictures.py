"""The images of equal seeds, as the page lays them out: by artifact, one strip for each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from errata.report.results import FLOAT, Report, Row
from errata.report.strips import data_uri, gap_of

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
    """A strip and its name; `uri` is empty where an earlier group of the page holds the same one."""

    row: Row
    label: str
    uri: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The strips of one artifact, the float model's first."""

    title: str
    films: tuple[Film, ...]


def tile_of(report: Report) -> Tile:
    """How large an image is shown in the grid."""
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
    """One group for each artifact, and one for the float model where it is there at fewer steps, too."""
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
    if row.is_float and not row.is_rival:
        return "float model"
    return "uncorrected" if row.verdict.kind == "uncorrected" else row.plan
