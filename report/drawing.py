"""Plots as SVG that takes its colours and font from the page around it, and labels that do not overlap."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.errors import ReportError
from errata.quality.intervals import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn with these, and replaced by the page's CSS variables, so that one plot serves light and dark pages.
# The hues are Okabe and Ito's, which stay apart for colour-blind readers; shapes tell the same a second time.
INK, SOFT, LINE = "#010203", "#040506", "#070809"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)
_CSS = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    BLUE: "var(--blue)",
    VERMILLION: "var(--vermillion)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
    ORANGE: "var(--orange)",
    SKY: "var(--sky)",
}
SERIES = ((BLUE, "o"), (VERMILLION, "D"), (GREEN, "s"), (PURPLE, "^"), (ORANGE, "v"), (SKY, "P"))
SMALL = 9.5
"""Size of names inside a plot."""
# Begins the id of an element with a tooltip.
_TIP = "tip:"
_FONT = "DejaVu Sans"
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": _FONT,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
}


def check_matplotlib() -> None:
    """Check that plots can be drawn.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as problem:
        raise ReportError("a report needs matplotlib; run `pip install errata[report]`") from problem


def figure_settings(salt: str) -> dict[str, Any]:
    """Return matplotlib's settings for a plot whose inner names depend on `salt` alone."""
    return {**_SETTINGS, "svg.hashsalt": salt}


@contextmanager
def axes_of(salt: str, *, width: float, height: float) -> Iterator[tuple[Any, Axes]]:
    """Yield a figure and its axes with our settings; an inch has 72 units, so that one unit is a point."""
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(figure_settings(salt)):
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
        yield figure, figure.add_subplot()


def svg(figure: Any, label: str) -> str:
    """Return the `<svg>` element of a figure; screen readers read `label`."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(figure_settings(label)):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inline(buffer.getvalue(), label)


def draw_point(
    axes: Axes,
    x: float,
    y: float,
    estimate: Estimate | None,
    *,
    tip: str = "",
    bar: float = 1.3,
    faint: bool = False,
    **style: Any,
) -> None:
    """Draw a marker, with the interval of `estimate` around `y` as its bar.

    tip: shown on hover. bar: line width. faint: whether the bar is translucent.
    """
    below, above = (0.0, 0.0) if estimate is None else reach(estimate)
    usual: dict[str, Any] = {"markersize": 6.5, "markeredgewidth": 1.5, "zorder": 3, "capsize": 3.5}
    if estimate is None:
        usual["capsize"] = 0
    drawn = axes.errorbar(
        [x],
        [y],
        yerr=[[below], [above]],
        linestyle="none",
        elinewidth=bar,
        **usual | style,
    )
    if faint:
        for collection in drawn.lines[2]:
            collection.set_alpha(0.4)
    if tip:
        drawn.lines[0].set_gid(f"{_TIP}{tip}")


def reach(estimate: Estimate) -> tuple[float, float]:
    """Return how far the interval goes below and above the value."""
    low, high = estimate.interval.low, estimate.interval.high
    return max(0.0, estimate.value - low), max(0.0, high - estimate.value)


_NO_METADATA: dict[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _inline(text: str, label: str) -> str:
    """Return the `<svg>` element alone: no prolog, no size, no ids that several plots would share."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # would rule the whole page
    text = re.sub(rf'<g id="{_TIP}([^"]*)"([^>]*)>', r'<g class="tip"\2><title>\1</title>', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML needs none, and a page without links has none
    text = text.replace("xlink:href", "href")
    opening = rf'<svg viewBox="\1" role="img" aria-label="{html.escape(label)}">'
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', lambda found: found.expand(opening), text)
    text = re.sub(rf"'?{_FONT}'?(, *[^;\"]*)?(?=[;\"])", "var(--sans)", text)
    return _replace_colors(text, _CSS)


def _replace_colors(text: str, table: dict[str, str]) -> str:
    pattern = re.compile("|".join(map(re.escape, table)), re.IGNORECASE)
    return pattern.sub(lambda found: table[found.group().lower()], text)


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
    """A name for a point; one that is not `needed` is left out if there is no room."""

    text: str
    point: tuple[float, float]
    needed: bool = True
    color: str = INK


Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


def draw_labels(figure: Any, axes: Axes, labels: Sequence[Label]) -> None:
    """Write the names, those that are needed first."""
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
        if free or label.needed:
            place, box = free[0] if free else next(_boxes(label.text, *own))
            taken.append(box)
            _write(axes, label, place)


def _write(axes: Axes, label: Label, place: tuple[int, int, str]) -> None:
    dx, dy, side = place
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
    """Return one label for each place; names of points that coincide are joined."""
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
    """Return how far a point lies from a name; readers take the nearest point for the one that it names."""
    x, y = point
    return max(box[0] - x, 0.0, x - box[2]) + max(box[1] - y, 0.0, y - box[3])


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
