"""Quality-against-cost plots as SVG text that takes its colours and font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from errata.errors import ReportError
from errata.quality.intervals import Estimate
from errata.report import formatting
from errata.report.results import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn with these, and replaced by the page's CSS variables, so that one plot serves light and dark pages.
# The hues are Okabe and Ito's, which stay apart for colour-blind readers; shapes tell the same a second time.
_INK, _SOFT, _LINE = "#010203", "#040506", "#070809"
_BLUE, _VERMILLION, _GREEN, _PURPLE, _ORANGE, _SKY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)
_CSS = {
    _INK: "var(--ink)",
    _SOFT: "var(--soft)",
    _LINE: "var(--line)",
    _BLUE: "var(--blue)",
    _VERMILLION: "var(--vermillion)",
    _GREEN: "var(--green)",
    _PURPLE: "var(--purple)",
    _ORANGE: "var(--orange)",
    _SKY: "var(--sky)",
}
_VERDICT_STYLE = {
    "uncorrected": {"color": _INK, "marker": "s", "markerfacecolor": _INK},
    "pays": {"color": _BLUE, "marker": "o", "markerfacecolor": _BLUE},
    "does not pay": {"color": _VERMILLION, "marker": "D", "markerfacecolor": _VERMILLION},
    "equal compute": {"color": _SOFT, "marker": "^", "markerfacecolor": "none"},
    "better": {"color": _BLUE, "marker": "o", "markerfacecolor": _BLUE},
    "worse": {"color": _VERMILLION, "marker": "D", "markerfacecolor": _VERMILLION},
    "not distinguishable": {"color": _SOFT, "marker": "o", "markerfacecolor": "none"},
}
_SERIES = ((_BLUE, "o"), (_VERMILLION, "D"), (_GREEN, "s"), (_PURPLE, "^"), (_ORANGE, "v"), (_SKY, "P"))
# The float model gets a line where it lies within this many spans of the points and bars; a span is at least
# this part of the distance.
_FARTHEST_LINE, _SMALLEST_SPAN = 2.0, 0.05
# Points closer than this part of the span of all points, about half a marker, count as one place.
_SAME_PLACE = 0.02
_FONT = "DejaVu Sans"
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": _FONT,
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "legend.frameon": False,
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


def overhead_plot(report: Report, artifact: str) -> str:
    """Fréchet distance of one artifact's plans against their overhead, as an `<svg>`.

    Bars are intervals of the paired change, so a bar that crosses the line of the uncorrected distance is a
    change that cannot be told from none.
    """
    rows = sorted(report.of(artifact), key=_overhead)
    points = [(100 * _overhead(row), row.frechet.value) for row in rows]
    with _figure(f"overhead-{artifact}", width=5.0, height=3.3) as (figure, axes):
        _draw_float_line(axes, report, rows)
        for row in rows:
            if not row.is_corrected:
                axes.axhline(row.frechet.value, color=_SOFT, linewidth=0.9, zorder=1)
        axes.plot(*zip(*points, strict=True), color=_LINE, linewidth=1.4, zorder=2)
        for row, (x, y) in zip(rows, points, strict=True):
            _draw_point(axes, x, y, row.change, **_VERDICT_STYLE[row.verdict.kind])
        for label, point in _labels([row.plan for row in rows], points):
            _annotate(axes, label, point, offset=(8, 6), color=_INK)
        axes.set_xlabel("overhead, % of the uncorrected run")
        axes.set_ylabel("Fréchet distance")
        axes.margins(x=0.14, y=0.18)
    return _svg(figure, f"Fréchet distance against overhead for {artifact}")


def cost_plot(report: Report) -> str:
    """Fréchet distance of every row against its wall-clock time per image, one line per artifact."""
    with _figure("cost", width=7.4, height=3.9) as (figure, axes):
        for index, artifact in enumerate(report.artifacts):
            color, marker = _SERIES[index % len(_SERIES)]
            rows = sorted(report.of(artifact), key=_overhead)
            points = [(1e3 * row.seconds_per_image, row.frechet.value) for row in rows]
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.2, zorder=2)
            for row, (x, y) in zip(rows, points, strict=True):
                face = "none" if row.is_corrected else color
                _draw_point(axes, x, y, row.frechet, color=color, marker=marker, markerfacecolor=face)
            axes.plot([], [], color=color, marker=marker, label=artifact)
        _draw_float_point(axes, report)
        axes.set_xlabel("milliseconds per image, wall-clock")
        axes.set_ylabel("Fréchet distance")
        axes.set_xlim(left=0)
        axes.margins(x=0.08, y=0.12)
        legend = {"ncols": 5, "handlelength": 1.5, "columnspacing": 1.2, "fontsize": 9.5}
        axes.legend(loc="upper center", bbox_to_anchor=(0.47, 1.16), **legend)
    return _svg(figure, "Fréchet distance against time per image, all artifacts")


def _labels(
    names: Sequence[str], points: Sequence[tuple[float, float]]
) -> list[tuple[str, tuple[float, float]]]:
    """One label for each place: names of points that coincide are joined."""
    x_span, y_span = (max(axis) - min(axis) for axis in zip(*points, strict=True))
    places: list[tuple[list[str], tuple[float, float]]] = []
    for name, (x, y) in zip(names, points, strict=True):
        for joined, (x0, y0) in places:
            if abs(x - x0) <= _SAME_PLACE * x_span and abs(y - y0) <= _SAME_PLACE * y_span:
                joined.append(name)
                break
        else:
            places.append(([name], (x, y)))
    return [(", ".join(joined), point) for joined, point in places]


def _overhead(row: Row) -> float:
    return row.overhead.defined if row.overhead is not None else 0.0


def _draw_point(axes: Axes, x: float, y: float, estimate: Estimate | None, **style: Any) -> None:
    """A marker, and as its bar the interval of `estimate` around `y`."""
    below, above = (0.0, 0.0) if estimate is None else _reach(estimate)
    axes.errorbar(
        [x],
        [y],
        yerr=[[below], [above]],
        linestyle="none",
        elinewidth=1.3,
        capsize=3.5 if estimate is not None else 0,
        markersize=6.5,
        markeredgewidth=1.5,
        zorder=3,
        **style,
    )


def _reach(estimate: Estimate) -> tuple[float, float]:
    low, high = estimate.interval.low, estimate.interval.high
    return max(0.0, estimate.value - low), max(0.0, high - estimate.value)


def _annotate(
    axes: Axes,
    text: str,
    point: tuple[float, float],
    *,
    offset: tuple[int, int],
    color: str,
    **options: Any,
) -> None:
    axes.annotate(
        text, point, xytext=offset, textcoords="offset points", color=color, fontsize=9.5, **options
    )


def _draw_float_line(axes: Axes, report: Report, rows: Sequence[Row]) -> None:
    """The float model's distance, as a line, or in words where a line would flatten everything else."""
    float_row = report.float_row
    if float_row is None:
        return
    value = float_row.frechet.value
    ends = [row.frechet.value + shift for row in rows for shift in _shifts(row)]
    reach = _FARTHEST_LINE * max(max(ends) - min(ends), _SMALLEST_SPAN * max(ends))
    # Between the usual places of points, which are 20 % and 100 %.
    if min(ends) - reach <= value <= max(ends) + reach:
        axes.axhline(value, color=_GREEN, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "offset": (0, -12)}
        _annotate(axes, "float model", (0.62, value), color=_GREEN, ha="center", **place)
    else:
        is_below = value < min(ends)
        text = f"float model {'↓' if is_below else '↑'} {formatting.value(float_row.frechet)}"
        place = {"xycoords": "axes fraction", "offset": (0, 6 if is_below else -14)}
        _annotate(axes, text, (0.62, 0 if is_below else 1), color=_GREEN, ha="center", **place)


def _shifts(row: Row) -> tuple[float, float]:
    below, above = _reach(row.change) if row.change is not None else (0.0, 0.0)
    return -below, above


def _draw_float_point(axes: Axes, report: Report) -> None:
    row = report.float_row
    if row is None:
        return
    x, y = 1e3 * row.seconds_per_image, row.frechet.value
    _draw_point(axes, x, y, row.frechet, color=_INK, marker="*", markerfacecolor=_INK)
    axes.plot([], [], color=_INK, marker="*", linestyle="none", label="float model")


@contextmanager
def _figure(salt: str, *, width: float, height: float) -> Iterator[tuple[Any, Axes]]:
    """A figure whose drawing and saving share our settings; inches at 72 units, so one unit is a point."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Any, label: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inline(buffer.getvalue(), label)


_NO_METADATA: dict[str, None] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def _inline(svg: str, label: str) -> str:
    """The `<svg>` element alone: no prolog, no size, no ids that several plots of one page would share."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # would rule the whole page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML needs none, and a page without links has none
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg
    )
    svg = re.sub(rf"'?{_FONT}'?(, *[^;\"]*)?(?=[;\"])", "var(--sans)", svg)
    return _replace_colors(svg, _CSS)


def _replace_colors(svg: str, table: dict[str, str]) -> str:
    pattern = re.compile("|".join(map(re.escape, table)), re.IGNORECASE)
    return pattern.sub(lambda found: table[found.group().lower()], svg)
