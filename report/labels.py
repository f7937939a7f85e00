"""Names beside the points of a plot, where they hide neither points nor each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.report.drawing import INK, SMALL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Points closer than this part of the span of all points, about half a marker, count as one place.
_SAME_PLACE = 0.02
# Mean width of a letter and height of a line, in units of the size; the page's fonts differ a little.
_LETTER, _LINE = 0.56, 1.15
# Half a marker, in points.
_MARKER = 5.0
# Where a name may stand: offset of its anchor in points, and which side of the text lies there.
_PLACES = (
    (8, 6, "left"),
    (8, -13, "left"),
    (-8, 6, "right"),
    (-8, -13, "right"),
    (9, -3, "left"),
    (-9, -3, "right"),
    (0, 10, "center"),
    (0, -18, "center"),
    (14, 18, "left"),
    (14, -26, "left"),
    (-14, 18, "right"),
    (-14, -26, "right"),
)


@dataclass(frozen=True)
class Label:
    """A name for a point; one that is not `needed` is left out where there is no room."""

    text: str
    point: tuple[float, float]
    needed: bool = True
    color: str = INK


Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


def draw_labels(figure: Any, axes: Axes, labels: Sequence[Label]) -> None:
    """Writes the names, those that are needed first."""
    figure.draw_without_rendering()  # places the axes, which offsets in points depend on
    frame = axes.get_window_extent()
    room: Box = (frame.x0, frame.y0, figure.bbox.x1, figure.bbox.y1)
    at = {label.point: tuple(axes.transData.transform(label.point)) for label in labels}
    taken = [(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER) for x, y in at.values()]
    for label in sorted(_joined(labels), key=lambda label: not label.needed):
        own, others = at[label.point], [at[point] for point in at if point != label.point]
        free = [
            (place, box)
            for place, box in _boxes(label.text, *own)
            if _is_inside(box, room)
            and not any(_overlap(box, other) for other in taken)
            and all(_distance(box, own) < _distance(box, other) for other in others)
        ]
        if not free and not label.needed:
            continue
        (dx, dy, side), box = free[0] if free else next(_boxes(label.text, *own))
        taken.append(box)
        text = axes.annotate(
            label.text,
            label.point,
            xytext=(dx, dy),
            textcoords="offset points",
            color=label.color,
            fontsize=SMALL,
            ha=side,
        )
        text.set_in_layout(False)  # else the axes would move from under the names


def _joined(labels: Sequence[Label]) -> list[Label]:
    """One label for each place: names of points that coincide are joined."""
    if not labels:
        return []
    x_span, y_span = (max(axis) - min(axis) for axis in zip(*(label.point for label in labels), strict=True))
    places: list[Label] = []
    for label in labels:
        for index, other in enumerate(places):
            (x, y), (x0, y0) = label.point, other.point
            near = abs(x - x0) <= _SAME_PLACE * x_span and abs(y - y0) <= _SAME_PLACE * y_span
            if near and label.needed and other.needed:
                places[index] = Label(f"{other.text}, {label.text}", other.point, True, other.color)
                break
        else:
            places.append(label)
    return places


def _boxes(text: str, x: float, y: float) -> Iterator[tuple[tuple[int, int, str], Box]]:
    width, height = _LETTER * SMALL * len(text), _LINE * SMALL
    for dx, dy, side in _PLACES:
        left = x + dx - {"left": 0.0, "center": width / 2, "right": width}[side]
        yield (dx, dy, side), (left, y + dy - 2, left + width, y + dy - 2 + height)


def _is_inside(box: Box, room: Box) -> bool:
    return box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]


def _distance(box: Box, point: tuple[float, ...]) -> float:
    """How far a point lies from a name; the nearest one is taken for the one that it names."""
    x, y = point
    return max(box[0] - x, 0.0, x - box[2]) + max(box[1] - y, 0.0, y - box[3])


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
