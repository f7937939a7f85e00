"""How errors grow along a run, and how much each step amplifies them, as plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from errata.correct.analysis.trajectories import UNCORRECTED
from errata.report.drawing import GREEN, INK, PURPLE, SERIES, SOFT, axes_of, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def growth_plot(artifact: str, growth: Mapping[str, Any]) -> str:
    """Relative error of one artifact at each sampling step, corrected and not (IEC paper, Fig. 2)."""
    with axes_of(f"growth-{artifact}", width=5.0, height=3.3) as (figure, axes):
        series = iter(SERIES * len(growth["relative"]))
        for plan, errors in _uncorrected_first(growth["relative"]).items():
            color, marker = (INK, "s") if plan == UNCORRECTED else next(series)
            _draw_line(axes, range(1, len(errors) + 1), errors, label=plan, color=color, marker=marker)
        axes.set_yscale("log")
        _format_percent(axes)
        axes.set_xlabel("sampling step")
        axes.set_ylabel("error relative to the float run")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, handlelength=1.6)
    return svg(figure, f"Error by sampling step for {artifact}, corrected and not")


def amplification_plot(artifact: str, measured: Mapping[str, Any]) -> str:
    """Norms of one step and of one refinement, by denoiser call (IEC paper, Fig. 1)."""
    with axes_of(f"amplification-{artifact}", width=5.0, height=3.3) as (figure, axes):
        axes.axhline(1, color=SOFT, linewidth=0.9, zorder=1)
        steps = [step + 1 for step in measured["steps"]]
        step_size = measured.get("step_size")
        refined = "one IEC iteration" + (f", λ = {step_size:g}" if step_size is not None else "")
        _draw_line(axes, steps, measured["jacobian"], label="one sampling step", color=PURPLE, marker="^")
        _draw_line(axes, steps, measured["iteration"], label=refined, color=GREEN, marker="o")
        axes.set_xlabel("sampling step")
        axes.set_ylabel("norm, lower bound" if measured.get("is_bound") else "norm")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handlelength=1.6)
    return svg(figure, f"Amplification of errors by step for {artifact}")


def _uncorrected_first(relative: Mapping[str, Any]) -> dict[str, Any]:
    return {UNCORRECTED: relative[UNCORRECTED], **relative} if UNCORRECTED in relative else dict(relative)


def _draw_line(axes: Axes, x: Any, y: Any, *, label: str, color: str, marker: str) -> None:
    every = max(1, len(y) // 12)  # a marker at each of 25 steps or more would hide the lines
    is_plain = label == UNCORRECTED
    axes.plot(
        x,
        y,
        label=label,
        color=color,
        linewidth=1.6,
        linestyle=(0, (4, 2)) if is_plain else "-",
        marker=marker,
        markersize=4,
        markevery=every,
        markerfacecolor="none" if is_plain else color,
    )


def _format_percent(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())


__all__ = ["amplification_plot", "growth_plot"]
