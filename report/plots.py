"""Fréchet distance against what it costs: all rows on one scale, and one artifact's against its overhead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from errata.quality import formatting
from errata.report.drawing import (
    BLUE,
    GREEN,
    INK,
    LINE,
    SERIES,
    SMALL,
    SOFT,
    VERMILLION,
    Label,
    axes_of,
    draw_labels,
    draw_point,
    reach,
    svg,
)
from errata.report.results import Report, Row
from errata.report.tables import headline_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VERDICT_STYLE = {
    "uncorrected": {"color": INK, "marker": "s", "markerfacecolor": INK},
    "pays": {"color": BLUE, "marker": "o", "markerfacecolor": BLUE},
    "does not pay": {"color": VERMILLION, "marker": "D", "markerfacecolor": VERMILLION},
    "better": {"color": BLUE, "marker": "o", "markerfacecolor": BLUE},
    "worse": {"color": VERMILLION, "marker": "D", "markerfacecolor": VERMILLION},
    "not distinguishable": {"color": SOFT, "marker": "o", "markerfacecolor": "none"},
}
_ALTERNATIVE_STYLE: dict[str, Any] = {
    "markersize": 5.0,
    "markeredgewidth": 1.1,
    "markerfacecolor": "none",
    "zorder": 2.5,
}
# The float model gets a line where it lies within this many spans of the points and bars; a span is at least
# this part of the distance.
_FARTHEST_LINE, _SMALLEST_SPAN = 2.0, 0.05
# Costs that lie further apart than this ratio are drawn on a logarithmic scale.
_WIDE = 12.0


def overhead_plot(report: Report, artifact: str) -> str:
    """Draw the Fréchet distance of one artifact's rows against their overhead, as an `<svg>`.

    Bars are intervals of the paired change: if one crosses the line of the uncorrected distance, the change
        is
    not significant. The line joins the corrected plans, without their alternatives.
    """
    rows = sorted(report.of(artifact), key=_overhead)
    joined = [row for row in rows if not row.is_alternative]
    with axes_of(f"overhead-{artifact}", width=5.0, height=3.3) as (figure, axes):
        _draw_float_line(axes, report, rows)
        for row in joined:
            if not row.is_corrected:
                axes.axhline(row.frechet.value, color=SOFT, linewidth=0.9, zorder=1)
        axes.plot(*zip(*map(_place, joined), strict=True), color=LINE, linewidth=1.4, zorder=2)
        for row in rows:
            style = _alternative_style() if row.is_alternative else _VERDICT_STYLE[row.verdict.kind]
            bar = 0.8 if row.is_alternative else 1.3
            draw_point(axes, *_place(row), row.change, tip=_tip(row), bar=bar, **style)
        axes.set_xlabel("overhead, % of the uncorrected run")
        axes.set_ylabel(headline_metric().title)
        axes.margins(x=0.14, y=0.18)
        draw_labels(figure, axes, [_label(row, _place(row)) for row in rows])
    return svg(figure, f"{headline_metric().title} against overhead for {artifact}")


def pareto_plot(report: Report) -> str:
    """Draw the Fréchet distance of every row against compute per image, and the Pareto front, as `<svg>`."""
    with axes_of("pareto", width=9.6, height=4.8) as (figure, axes):
        _draw_front(axes, report)
        for index, artifact in enumerate(report.artifacts):
            color, marker = SERIES[index % len(SERIES)]
            for row in report.of(artifact):
                _draw_row(axes, report, row, color=color, marker=marker)
            axes.plot([], [], color=color, marker=marker, linestyle="none", label=artifact)
        for row in report.rows:
            if row.is_float:
                _draw_row(axes, report, row, color=INK, marker="*")
        _describe(axes, report)
        named = [row for row in report.rows if row.front == "on" or not row.is_alternative]
        labels = [Label(_full_name(row), _cost_place(report, row), row.front == "on") for row in named]
        draw_labels(figure, axes, labels)
    return svg(figure, f"{headline_metric().title} against compute per image, all rows")


def seconds_of(report: Report, row: Row) -> float:
    """Return seconds of compute per image; wall-clock in a report of an earlier release without compute."""
    return row.compute if _has_compute(report) else row.seconds_per_image


def _has_compute(report: Report) -> bool:
    return all(row.compute > 0 for row in report.rows)


def _draw_row(axes: Axes, report: Report, row: Row, *, color: str, marker: str) -> None:
    style: dict[str, Any] = {"color": color, "marker": marker, "markerfacecolor": color}
    if row.is_corrected:
        style |= {"markeredgecolor": INK, "markersize": 7.5}
    if row.is_float:
        style |= {"markersize": 11.0, "markeredgewidth": 0.8}
    if row.is_alternative:
        style |= _ALTERNATIVE_STYLE | ({"markersize": 8.0} if row.is_float else {})
    bar = 0.5 if row.is_alternative else 0.9
    draw_point(
        axes,
        *_cost_place(report, row),
        row.frechet,
        tip=f"{_full_name(row)}: {formatting.value(row.frechet)}",
        bar=bar,
        capsize=0,
        faint=True,
        **style,
    )


def _draw_front(axes: Axes, report: Report) -> None:
    """Draw the best distance for each compute, as a staircase: nothing was measured between two rows."""
    front = sorted(_cost_place(report, row) for row in report.rows if row.front == "on")
    if front:
        axes.plot(
            *zip(*front, strict=True),
            color=GREEN,
            linewidth=1.8,
            alpha=0.75,
            drawstyle="steps-post",
            label="Pareto front",
            zorder=2,
        )


def _describe(axes: Axes, report: Report) -> None:
    """Set up axes and legend."""
    costs = [seconds_of(report, row) for row in report.rows]
    name = "compute" if _has_compute(report) else "wall-clock time"
    axes.set_xlabel(f"{name}, milliseconds per image")
    axes.set_ylabel(headline_metric().title)
    if max(costs) > _WIDE * min(costs):
        _scale_by_ratio(axes)
    else:
        axes.set_xlim(left=0)
    axes.margins(x=0.08, y=0.08)
    _draw_legend(axes, report)


def _draw_legend(axes: Axes, report: Report) -> None:
    """Draw the legend, with the kinds of rows after the artifacts."""
    rows = report.rows
    kinds: list[tuple[str, bool, dict[str, Any]]] = [
        ("float model", any(row.is_float for row in rows), {"color": INK, "marker": "*", "markersize": 10}),
        (
            "outlined: corrected",
            any(row.is_corrected for row in rows),
            {"color": SOFT, "marker": "o", "markeredgecolor": INK, "markeredgewidth": 1.5, "markersize": 7},
        ),
        (
            "hollow: compute-matched",
            any(row.is_alternative for row in rows),
            {"color": SOFT, "marker": "o", **_ALTERNATIVE_STYLE},
        ),
    ]
    for label, is_there, style in kinds:
        if is_there:
            axes.plot([], [], linestyle="none", label=label, **style)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, handlelength=1.6, columnspacing=1.6)


def _scale_by_ratio(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log", subs=[2, 5])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _alternative_style() -> dict[str, Any]:
    return {"color": SOFT, "marker": "^", **_ALTERNATIVE_STYLE}


def _label(row: Row, point: tuple[float, float]) -> Label:
    name = "uncorrected" if row.verdict.kind == "uncorrected" else row.plan
    return Label(name, point, needed=not row.is_alternative, color=SOFT if row.is_alternative else INK)


def _full_name(row: Row) -> str:
    if row.is_float:
        return "float" if not row.is_alternative else f"float, {row.plan}"
    return row.artifact if not row.is_corrected and not row.is_alternative else f"{row.artifact}, {row.plan}"


def _tip(row: Row) -> str:
    change = f", change {formatting.signed(row.change)}" if row.change is not None else ""
    return f"{row.stands_for or row.plan}: {formatting.value(row.frechet)}{change}"


def _overhead(row: Row) -> float:
    return row.overhead.defined if row.overhead is not None else 0.0


def _place(row: Row) -> tuple[float, float]:
    return 100 * _overhead(row), row.frechet.value


def _cost_place(report: Report, row: Row) -> tuple[float, float]:
    return 1e3 * seconds_of(report, row), row.frechet.value


def _draw_float_line(axes: Axes, report: Report, rows: Sequence[Row]) -> None:
    """Draw the float model's distance as a line, or as text if a line would flatten everything else."""
    float_row = report.float_row
    if float_row is None:
        return
    value = float_row.frechet.value
    ends = [row.frechet.value + shift for row in rows for shift in _shifts(row)]
    far = _FARTHEST_LINE * max(max(ends) - min(ends), _SMALLEST_SPAN * max(ends))
    # Between the usual places of points, which are 20 % and 100 %.
    if min(ends) - far <= value <= max(ends) + far:
        axes.axhline(value, color=GREEN, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "xytext": (0, -12)}
        height: float = value
    else:
        is_below = value < min(ends)
        height = 0 if is_below else 1
        place = {"xycoords": "axes fraction", "xytext": (0, 6 if is_below else -14)}
    arrow = "" if place["xycoords"] != "axes fraction" else f" {'↑' if height else '↓'} {_value(float_row)}"
    axes.annotate(
        f"float model{arrow}",
        (0.62, height),
        textcoords="offset points",
        color=GREEN,
        fontsize=SMALL,
        ha="center",
        **place,
    )


def _value(row: Row) -> str:
    return formatting.value(row.frechet)


def _shifts(row: Row) -> tuple[float, float]:
    below, above = reach(row.change) if row.change is not None else (0.0, 0.0)
    return -below, above
