"""Line plots of the analysis as files; matplotlib is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.correct.analysis.values import Values
from errata.errors import ReportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _SOFT, _LINE = "#1f2430", "#5b6472", "#d5d9e0"
# Okabe and Ito's hues, which colour-blind readers can tell apart; the dashes help too.
_SERIES = (
    (_INK, "-"),
    ("#0072b2", "-"),
    ("#d55e00", (0, (6, 2))),
    ("#009e73", (0, (2, 1.5))),
    ("#cc79a7", (0, (6, 2, 1.5, 2))),
    ("#e69f00", (0, (4, 1.5))),
    ("#56b4e9", (0, (1, 1))),
)
_SETTINGS = {
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": _INK,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def drawn(path: str | Path, *, panels: int) -> Iterator[tuple[Axes, ...]]:
    """Yield the axes of a figure that is written to `path` after the body; its suffix chooses the format.

    Raises:
        ReportError: matplotlib is not installed, or cannot write that format.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise ReportError("a plot needs matplotlib; run `pip install errata[report]`") from problem
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(5.4 * panels, 3.5), layout="constrained")
        _require_format(figure, Path(path))
        yield tuple(figure.subplots(1, panels, squeeze=False)[0])
        figure.savefig(path, dpi=150)


def draw_line(
    axes: Axes, x: Sequence[int], y: Sequence[float], *, color: Any, name: str, dashes: Any = "-"
) -> None:
    """Draw one named line."""
    axes.plot(x, y, color=color, linestyle=dashes, linewidth=1.7, label=name)


def draw_band(axes: Axes, x: Sequence[int], values: Values) -> None:
    """Draw the mean as a line, and the range of the samples as a band."""
    axes.fill_between(x, values.low, values.high, color="#0072b2", alpha=0.18, linewidth=0)
    axes.plot(x, values.mean, color="#0072b2", linewidth=1.7)


def draw_limit(axes: Axes, value: float) -> None:
    """Draw a horizontal line at a level that matters."""
    axes.axhline(value, color=_SOFT, linewidth=0.9, linestyle=(0, (5, 3)), zorder=1)


def label(axes: Axes, title: str, y: str) -> None:
    """Set the title and the label of the vertical axis."""
    axes.set_title(title)
    axes.set_ylabel(y)


def name_lines(axes: Axes) -> None:
    """Add a legend beside the lines, in their order."""
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def series(count: int) -> list[tuple[Any, Any]]:
    """Return colours and dashes for `count` unordered lines; they repeat after seven."""
    return [_SERIES[i % len(_SERIES)] for i in range(count)]


def ramp(count: int) -> list[Any]:
    """Return colours for `count` ordered lines, from light to dark."""
    import matplotlib

    colors = matplotlib.colormaps["viridis_r"]
    return [colors(0.12 + 0.8 * i / max(1, count - 1)) for i in range(count)]


def _require_format(figure: Any, path: Path) -> None:
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise ReportError(f"a plot cannot be written as {path.name!r}; endings are {', '.join(known)}")
