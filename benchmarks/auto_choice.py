"""Measure the choice of `Plan.auto` for several artifacts, against every plan that costs nothing.

    python benchmarks/auto_choice.py --work runs/sheets --steps 25
    python benchmarks/auto_choice.py --work runs/sheets --steps 100

Artifacts are those of `sheets.py` in the same folder, made here if they are not there. The choice sees other
noise than the images that are measured. It is compared, in pairs, with no correction and with the free plan
that is best on the measured images themselves, which no choice can know. CPU seconds are those of the choice.
"""

from __future__ import annotations

import argparse
import time

from sheets import MEASURED, artifact_for, common_parser, opened, sampled
from torch import Tensor

from errata.correct import Plan
from errata.correct.planner.auto import free_plans
from errata.correct.sampling import PlanSampler, default_inputs
from errata.quality.intervals import mean_estimate
from errata.quality.paired import psnr

RECIPES = (
    "w8a8",
    "deepcache-10",
    "w8a8+deepcache-10",
    "w8a8+deepcache-10:branch=1",
    "w8a8+cachequant-10",
)


def main() -> None:
    """Run the benchmark."""
    options = common_parser(__doc__, steps=25, recipes=RECIPES).parse_args()
    pipe, floats = opened(options, options.pipeline)
    for recipe in options.recipes:
        print(_line(pipe, recipe, options, floats), flush=True)


def _line(pipe: object, recipe: str, options: argparse.Namespace, floats: Tensor) -> str:
    """Return the line of a recipe."""
    deployed = artifact_for(pipe, options, recipe)  # type: ignore[arg-type]
    start = time.process_time()
    chosen = Plan.auto(deployed)
    seconds = time.process_time() - start

    def measured(plan: Plan) -> Tensor:
        images = sampled(PlanSampler(deployed, plan, seed=MEASURED, inputs=default_inputs), options.samples)
        return psnr(images, floats)

    plans = [Plan.none(), *free_plans(deployed)]
    values = {plan: measured(plan) for plan in plans}
    best = max(plans, key=lambda plan: float(values[plan].mean()))
    own, none = measured(chosen), values[plans[0]]
    return (
        f"{recipe:28} auto {_name(chosen):28} {float(own.mean()):6.2f} dB, {seconds:5.1f} CPU s; to none "
        f"{_change(own, none)}; to the best, {_name(best)}, {_change(own, values[best])}"
    )


def _name(plan: Plan) -> str:
    parts = [method for method, _ in plan.parts if method is not None]
    return (
        " + ".join(
            type(method).__name__ + (f" {method.gain:g}" if hasattr(method, "gain") else "")
            for method in parts
        )
        or "none"
    )


def _change(values: Tensor, others: Tensor) -> str:
    change = mean_estimate(values - others)
    return f"{change.value:+.2f} ({change.interval.low:+.2f} to {change.interval.high:+.2f})"


if __name__ == "__main__":
    main()
