"""How errors grow along a run, corrected and not: measured, and drawn against the sampling step.

In a report's JSON, by artifact:

    timesteps   of every sampling step
    relative    by plan ("uncorrected" is the artifact's own run): mean over samples, at each step, of
                ‖x − x_float‖ / ‖x_float‖, from equal noise (IEC paper, Fig. 2)
    samples     how many trajectories
    amplification   if it was asked for (IEC paper, Fig. 1):
        asked       the denoiser calls, in the grammar of `Plan.steps`
        steps       those calls
        jacobian    at each, mean over samples of ‖A + B J‖: how much a sampling step amplifies an error
        iteration   likewise of ‖∇G‖: below 1, an iteration of IEC contracts
        step_size   its λ
        samples     how many trajectories
        is_bound    whether the norms are lower bounds

`timesteps`, `relative` and `samples` need a float model. The symbols are in
`errata.correct.analysis.amplification_measure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from errata.correct import Plan, amplification, trajectory_error
from errata.correct.analysis.trajectories import UNCORRECTED
from errata.correct.sampling import Inputs
from errata.deploy import DeployedPipeline
from errata.report.drawing import GREEN, INK, PURPLE, SERIES, SOFT, axes_of, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Means of this many trajectories are smooth to the eye; they cost little beside the images.
SAMPLES = 8
# Norms differ little between trajectories, and one costs hundreds of evaluations at each step.
AMPLIFIED = 2
# λ of the iterations whose contraction is measured: IEC's own default.
_STEP_SIZE = 0.5


def growth_of(
    artifacts: Mapping[str, DeployedPipeline],
    baseline: DiffusionPipeline | None,
    plans: Mapping[str, Mapping[str, Plan]],
    *,
    seed: int,
    inputs: Inputs,
    amplification_steps: str | None = None,
) -> dict[str, Any]:
    """Return growth by artifact, as in the module's description; empty if nothing was asked for.

    plans: by name, of each artifact. amplification_steps: denoiser calls at which to measure amplification;
    None for none. Each takes hundreds of evaluations.
    """
    grown: dict[str, Any] = {}
    if baseline is not None:
        grown = _errors(artifacts, baseline, plans, seed=seed, inputs=inputs)
    if amplification_steps is not None:
        for name, deployed in artifacts.items():
            measured = _amplification(deployed, amplification_steps, seed=seed, inputs=inputs)
            grown[name] = {**grown.get(name, {}), "amplification": measured}
    return grown


def amplified_at(growth: Mapping[str, Any]) -> str | None:
    """Return the `amplification_steps` that these were measured with."""
    return next((each["amplification"]["asked"] for each in growth.values() if "amplification" in each), None)


def _errors(
    artifacts: Mapping[str, DeployedPipeline],
    baseline: DiffusionPipeline,
    plans: Mapping[str, Mapping[str, Plan]],
    *,
    seed: int,
    inputs: Inputs,
) -> dict[str, Any]:
    grown = {}
    for name, deployed in artifacts.items():
        correcting = {each: plan for each, plan in plans[name].items() if not plan.corrects_nothing}
        errors = trajectory_error(
            deployed,
            baseline,
            plans=correcting,
            samples=SAMPLES,
            batch_size=SAMPLES,
            seed=seed,
            inputs=inputs,
        )
        grown[name] = {
            "timesteps": list(errors.timesteps),
            "relative": {plan: list(values.mean) for plan, values in errors.relative.items()},
            "samples": SAMPLES,
        }
    return grown


def _amplification(deployed: DeployedPipeline, steps: str, *, seed: int, inputs: Inputs) -> dict[str, Any]:
    measured = amplification(
        deployed, step_sizes=(_STEP_SIZE,), steps=steps, samples=AMPLIFIED, seed=seed, inputs=inputs
    )
    return {
        "asked": steps,
        "steps": list(measured.steps),
        "jacobian": list(measured.propagation.mean),
        "iteration": list(measured.refinement[_STEP_SIZE].mean),
        "step_size": _STEP_SIZE,
        "samples": AMPLIFIED,
        "is_bound": measured.is_bound,
    }


def growth_plot(artifact: str, growth: Mapping[str, Any]) -> str:
    """Draw the relative error of one artifact at each sampling step (IEC paper, Fig. 2)."""
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
    """Draw the norms of one step and of one refinement, by denoiser call (IEC paper, Fig. 1)."""
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
