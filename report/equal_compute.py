"""What else the compute of a correction buys: the rows that a corrected one has to beat.

A corrected run costs more denoiser time than the uncorrected one. The same time also buys more sampling
steps, more full steps in place of cached ones, another corrector, or the float model with fewer steps. A
comparison of a correction with the uncorrected run alone hides all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from errata.correct import Forecast, Hindsight, Method, Plan, Refresh, SecondOrder, wrap
from errata.correct.costs import Costs, plain_evaluations, price
from errata.correct.steps import spelled
from errata.correct.traits import has_second_order_match
from errata.deploy import DeployedPipeline
from errata.errors import ArtifactMismatchError, PlanError, first_line
from errata.runtime.schedule import CacheSchedule, StepKind

# Below this overhead nothing else can be bought: one more step of a hundred costs as much.
LEAST_OVERHEAD = 0.01
# Costs are measured; a rival may be so much dearer and still count as equal.
TOLERANCE = 1.02
# Of one step; costs are measured, and a step that costs what the correction does is meant to fit.
_ROUNDING = 0.05


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another use of about the same compute on the same artifact.

    Attributes:
        name: of its row.
        plan: what to do.
        steps: sampling steps; None are the recorded ones.
        stands_for: what it is, in words.
        seconds: of the denoiser calls of a batch, as expected from their costs.
    """

    name: str
    plan: Plan
    steps: int | None = None
    stands_for: str
    seconds: float


def rivals_of(
    deployed: DeployedPipeline,
    plan: Plan,
    extra: Mapping[StepKind, float],
    costs: Costs,
    *,
    refused: Callable[[str], None] = lambda _: None,
) -> list[Rival]:
    """Rivals of a plan that adds these denoiser calls to an image; those that the artifact can serve.

    `refused` hears of each other one, and why.
    """
    seconds, base = price(extra, costs), price(plain_evaluations(deployed.schedule), costs)
    offered = [_free_correctors(deployed.schedule, base)]
    if seconds > LEAST_OVERHEAD * base:
        offered += [
            _more_steps(deployed, seconds, base, costs),
            _more_full_steps(deployed.schedule, seconds, base, costs),
            _second_order(plan, base + seconds),
        ]
    wanted = [rival for rival in offered if rival is not None and rival.plan != plan]
    return [rival for rival in wanted if _is_served(deployed, rival, refused)]


def float_steps(seconds: float, cost: float, *, most: int) -> int | None:
    """Steps of the float model that take so many seconds, at `cost` for each; None beyond `most`, or at 0."""
    steps = _affordable(seconds, cost)
    return steps if 1 <= steps <= most else None


def _affordable(seconds: float, one: float) -> int:
    """How many of what costs `one` each; a rival must not cost more, but for what costs scatter."""
    return int(seconds / one + _ROUNDING)


def _more_steps(deployed: DeployedPipeline, seconds: float, base: float, costs: Costs) -> Rival | None:
    """More sampling steps; an artifact with a cache serves them from it."""
    calls = deployed.schedule.calls_per_step
    one = calls * costs["cached" if deployed.schedule.has_cache else "full"]
    more = _affordable(seconds, one)
    if not more:
        return None
    steps = deployed.num_inference_steps + more
    return Rival(
        name=f"{steps} steps",
        plan=Plan.none(),
        steps=steps,
        stands_for=f"no correction, {steps} steps",
        seconds=base + more * one,
    )


def _more_full_steps(schedule: CacheSchedule, seconds: float, base: float, costs: Costs) -> Rival | None:
    """Cached steps in full, spread so that the longest interval is as short as it can be."""
    if not schedule.has_cache:
        return None
    one = schedule.calls_per_step * (costs["full"] - costs["cached"])
    chosen = _spread(schedule, _affordable(seconds, one)) if one > 0 else []
    if not chosen:
        return None
    count = len(chosen)
    return Rival(
        name=f"+{count} full",
        plan=Plan(Refresh(), _expression(schedule, chosen)),
        stands_for=f"no correction, {count} more full step{'s' * (count > 1)}",
        seconds=base + count * one,
    )


def _expression(schedule: CacheSchedule, chosen: list[int]) -> str:
    """A steps expression for sampling steps of a schedule."""
    calls = schedule.calls_per_step
    return spelled(tuple(step * calls + call for step in chosen for call in range(calls)))


def _spread(schedule: CacheSchedule, count: int) -> list[int]:
    """Sampling steps to evaluate in full besides, each halving the longest interval that is left."""
    calls = schedule.calls_per_step
    total = schedule.num_steps // calls
    full = sorted({step // calls for step in schedule.full_steps})
    chosen: list[int] = []
    for _ in range(min(count, total - len(full))):
        bounds = [*full, total]
        start, end = max(pairwise(bounds), key=lambda pair: pair[1] - pair[0])
        if end - start < 2:
            break
        middle = (start + end) // 2
        chosen.append(middle)
        full = sorted([*full, middle])
    return sorted(chosen)


def _second_order(plan: Plan, seconds: float) -> Rival | None:
    """Where a plan evaluates once more at each of some steps, the method that averages the two."""
    methods: list[tuple[Method | None, str]] = [part for part in plan.parts if part[1] != "none"]
    if len(methods) != 1 or not has_second_order_match(methods[0][0]):
        return None
    steps = methods[0][1]
    return Rival(
        name=f"second-order at {steps}",
        plan=Plan(SecondOrder(), steps),
        stands_for=f"another corrector, SecondOrder at {steps}",
        seconds=seconds,
    )


def _free_correctors(schedule: CacheSchedule, base: float) -> Rival | None:
    """What corrects a cached run at no evaluation."""
    if not schedule.has_cache:
        return None
    return Rival(
        name="forecast+hindsight",
        plan=Plan(Forecast(order=1)) + Plan(Hindsight()),
        stands_for="another corrector that costs no evaluation, Forecast and Hindsight",
        seconds=base,
    )


def _is_served(deployed: DeployedPipeline, rival: Rival, refused: Callable[[str], None]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps that were not recorded; the report says it in words
            at = deployed if rival.steps is None else deployed.at_steps(rival.steps)
        wrap(at, rival.plan)
    except (PlanError, ArtifactMismatchError) as problem:
        refused(f"{rival.stands_for}: {first_line(problem)}")
        return False
    return True


__all__ = ["LEAST_OVERHEAD", "TOLERANCE", "Rival", "float_steps", "rivals_of"]
