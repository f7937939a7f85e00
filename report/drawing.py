"""Plots as SVG text that takes its colours and font from the page around it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
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
# Begins the id of an element that says something when pointed at.
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


def require_matplotlib() -> None:
    """Check that plots can be drawn.

    Raises:
        ReportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as problem:
        raise ReportError("a report needs matplotlib; run `pip install errata[report]`") from problem


def figure_settings(salt: str) -> dict[str, Any]:
    """Matplotlib's settings for a plot whose inner names depend on `salt` alone."""
    return {**_SETTINGS, "svg.hashsalt": salt}


@contextmanager
def axes_of(salt: str, *, width: float, height: float) -> Iterator[tuple[Any, Axes]]:
    """A figure and its axes, drawn with our settings; inches of 72 units, so that one unit is a point."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(figure_settings(salt)):
        figure = Figure(figsize=(width, height), dpi=72, layout="constrained")
        yield figure, figure.add_subplot()


def svg(figure: Any, label: str) -> str:
    """The `<svg>` element of a figure; `label` is read aloud in its place."""
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
    """A marker, and as its bar the interval of `estimate` around `y`.

    tip: shows when pointed at. bar: its width; one that is `faint` lets others through.
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
    """How far the interval goes below and above the value."""
    low, high = estimate.interval.low, estimate.interval.high
    return max(0.0, estimate.value - low), max(0.0, high - estimate.value)


_NO_METADATA: dict[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _inline(text: str, label: str) -> str:
    """The `<svg>` element alone: no prolog, no size, no ids that several plots of one page would share."""
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
