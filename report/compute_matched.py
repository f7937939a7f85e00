"""Compute-matched alternatives: what else the denoiser time of a correction could be spent on.

A corrected run takes more denoiser time than the uncorrected one. The same time could go into more sampling
steps, more full steps in place of cached ones, another corrector, or the float model with fewer steps. A
correction pays only if it beats these as well as no correction.
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

# Below this overhead there is no alternative: one more step in a hundred costs as much.
LEAST_OVERHEAD = 0.01
# Costs are measured; an alternative may cost this much more and still count as equal.
TOLERANCE = 1.02
# Of one step; costs are measured, and a step that costs what the correction does is meant to fit.
_ROUNDING = 0.05


@dataclass(frozen=True, kw_only=True)
class ComputeMatched:
    """Another use of about the same compute on the same artifact.

    Attributes:
        name: of its row.
        plan: what to do.
        steps: sampling steps; None for the recorded number.
        stands_for: what it is, in words.
        seconds: of the denoiser calls of a batch, as expected from their costs.
    """

    name: str
    plan: Plan
    steps: int | None = None
    stands_for: str
    seconds: float


def alternatives_of(
    deployed: DeployedPipeline,
    plan: Plan,
    extra: Mapping[StepKind, float],
    costs: Costs,
    *,
    refused: Callable[[str], None] = lambda _: None,
) -> list[ComputeMatched]:
    """Return the alternatives to a plan that adds `extra` calls to an image, if the artifact can serve them.

    `refused` is called for each that it cannot serve, with the reason.
    """
    seconds, base = price(extra, costs), price(plain_evaluations(deployed.schedule), costs)
    offered = [_free_correctors(deployed.schedule, base)]
    if seconds > LEAST_OVERHEAD * base:
        offered += [
            _more_steps(deployed, seconds, base, costs),
            _more_full_steps(deployed.schedule, seconds, base, costs),
            _second_order(plan, base + seconds),
        ]
    wanted = [each for each in offered if each is not None and each.plan != plan]
    return [each for each in wanted if _is_served(deployed, each, refused)]


def float_steps(seconds: float, cost: float, *, most: int) -> int | None:
    """Return how many steps of the float model take so many seconds; None if 0 or more than `most`."""
    steps = _affordable(seconds, cost)
    return steps if 1 <= steps <= most else None


def _affordable(seconds: float, one: float) -> int:
    """Return how many fit that cost `one` each, with a margin for the scatter of measured costs."""
    return int(seconds / one + _ROUNDING)


def _more_steps(
    deployed: DeployedPipeline, seconds: float, base: float, costs: Costs
) -> ComputeMatched | None:
    """Return the run with more sampling steps; an artifact with a cache serves them from it."""
    calls = deployed.schedule.calls_per_step
    one = calls * costs["cached" if deployed.schedule.has_cache else "full"]
    more = _affordable(seconds, one)
    if not more:
        return None
    steps = deployed.num_inference_steps + more
    return ComputeMatched(
        name=f"{steps} steps",
        plan=Plan.none(),
        steps=steps,
        stands_for=f"no correction, {steps} steps",
        seconds=base + more * one,
    )


def _more_full_steps(
    schedule: CacheSchedule, seconds: float, base: float, costs: Costs
) -> ComputeMatched | None:
    """Return the run with some cached steps in full, which keep the longest interval as short as possible."""
    if not schedule.has_cache:
        return None
    one = schedule.calls_per_step * (costs["full"] - costs["cached"])
    chosen = _spread(schedule, _affordable(seconds, one)) if one > 0 else []
    if not chosen:
        return None
    count = len(chosen)
    return ComputeMatched(
        name=f"+{count} full",
        plan=Plan(Refresh(), _expression(schedule, chosen)),
        stands_for=f"no correction, {count} more full step{'s' * (count > 1)}",
        seconds=base + count * one,
    )


def _expression(schedule: CacheSchedule, chosen: list[int]) -> str:
    """Return a steps expression for sampling steps of a schedule."""
    calls = schedule.calls_per_step
    return spelled(tuple(step * calls + call for step in chosen for call in range(calls)))


def _spread(schedule: CacheSchedule, count: int) -> list[int]:
    """Return sampling steps to evaluate in full, each of which halves the longest interval left."""
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


def _second_order(plan: Plan, seconds: float) -> ComputeMatched | None:
    """Return the second-order method at the plan's steps, which averages the two evaluations of a step."""
    methods: list[tuple[Method | None, str]] = [part for part in plan.parts if part[1] != "none"]
    if len(methods) != 1 or not has_second_order_match(methods[0][0]):
        return None
    steps = methods[0][1]
    return ComputeMatched(
        name=f"second-order at {steps}",
        plan=Plan(SecondOrder(), steps),
        stands_for=f"another corrector, SecondOrder at {steps}",
        seconds=seconds,
    )


def _free_correctors(schedule: CacheSchedule, base: float) -> ComputeMatched | None:
    """Return the correctors of a cached run that cost no evaluation."""
    if not schedule.has_cache:
        return None
    return ComputeMatched(
        name="forecast+hindsight",
        plan=Plan(Forecast(order=1)) + Plan(Hindsight()),
        stands_for="another corrector that costs no evaluation, Forecast with Hindsight",
        seconds=base,
    )


def _is_served(
    deployed: DeployedPipeline, alternative: ComputeMatched, refused: Callable[[str], None]
) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about steps that were not recorded; the report says so itself
            at = deployed if alternative.steps is None else deployed.at_steps(alternative.steps)
        wrap(at, alternative.plan)
    except (PlanError, ArtifactMismatchError) as problem:
        refused(f"{alternative.stands_for}: {first_line(problem)}")
        return False
    return True
