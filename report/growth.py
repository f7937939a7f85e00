"""How errors grow along a run, corrected and not: what the page draws against the sampling step.

In a report's JSON, by artifact:

    timesteps   of every sampling step
    relative    by plan ("uncorrected" is the artifact's own run): mean over samples, at each step, of
                ‖x − x_float‖ / ‖x_float‖, from equal noise (IEC paper, Fig. 2)
    samples     how many trajectories
    amplification   where it was asked for (IEC paper, Fig. 1):
        asked       for which denoiser calls, in the grammar of `Plan.steps`
        steps       those calls
        jacobian    at each, mean over samples of ‖A + B J‖: how much a sampling step amplifies an error
        iteration   likewise of ‖∇G‖: below 1, an iteration of IEC contracts
        step_size   its λ
        samples     how many trajectories
        is_bound    whether the norms are lower bounds

Without a float model there are no `timesteps`, `relative` and `samples`. The symbols are in
`errata.correct.analysis.amplification_measure`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from errata.correct import Plan, amplification, trajectory_error
from errata.correct.sampling import Inputs
from errata.deploy import DeployedPipeline

# Means of this many trajectories are smooth to the eye; they cost little beside the images.
SAMPLES = 8
# Norms differ little between trajectories, and one costs hundreds of evaluations at each step.
AMPLIFIED = 2
# λ of the iterations whose contraction is measured: IEC's own default.
_STEP_SIZE = 0.5


def growth_of(
    artifacts: Mapping[str, DeployedPipeline],
    baseline: DiffusionPipeline | None,
    plans: Mapping[str, Plan],
    *,
    seed: int,
    inputs: Inputs,
    amplification_steps: str | None = None,
) -> dict[str, Any]:
    """By artifact, as in the module's description; empty where there is nothing to compare or to amplify.

    amplification_steps: the denoiser calls whose amplification is measured; None for none. Each takes
    hundreds of evaluations.
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
    """The `amplification_steps` that these were measured with."""
    return next((each["amplification"]["asked"] for each in growth.values() if "amplification" in each), None)


def _errors(
    artifacts: Mapping[str, DeployedPipeline],
    baseline: DiffusionPipeline,
    plans: Mapping[str, Plan],
    *,
    seed: int,
    inputs: Inputs,
) -> dict[str, Any]:
    correcting = {name: plan for name, plan in plans.items() if not plan.corrects_nothing}
    grown = {}
    for name, deployed in artifacts.items():
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
