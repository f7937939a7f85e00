"""How errors grow along a run, corrected and not: what the page draws against the sampling step.

In a report's JSON, by artifact:

    timesteps   of every sampling step
    relative    by plan ("uncorrected" is the artifact's own run): mean over samples, at each step, of
                ‖x − x_float‖ / ‖x_float‖, from equal noise (IEC paper, Fig. 2)
    samples     how many trajectories
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from errata.correct import Plan, trajectory_error
from errata.correct.sampling import Inputs
from errata.deploy import DeployedPipeline

# Means of this many trajectories are smooth to the eye; they cost little beside the images.
SAMPLES = 8


def growth_of(
    artifacts: Mapping[str, DeployedPipeline],
    baseline: DiffusionPipeline | None,
    plans: Mapping[str, Plan],
    *,
    seed: int,
    inputs: Inputs,
) -> dict[str, Any]:
    """By artifact, as in the module's description; empty without a float model to compare with."""
    if baseline is None:
        return {}
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
