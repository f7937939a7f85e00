"""What denoiser calls cost, and what a correction adds to that."""

from __future__ import annotations

from collections.abc import Mapping

from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule, StepKind

Costs = Mapping[StepKind, float]
"""Measured seconds of one denoiser call of each kind."""


def measure_costs(deployed: DeployedPipeline, *, batch_size: int) -> Costs:
    """Return the measured seconds of a denoiser call of each kind; the artifact must have run once."""
    kinds: tuple[StepKind, ...] = ("full", "cached") if deployed.schedule.has_cache else ("full",)
    return {kind: deployed.denoiser.cost(kind, batch_size=batch_size) for kind in kinds}


def price(counts: Mapping[StepKind, float], costs: Costs) -> float:
    """Return the seconds that these numbers of calls take."""
    return sum(number * costs[kind] for kind, number in counts.items())


def plain_evaluations(schedule: CacheSchedule) -> dict[StepKind, float]:
    """Return the denoiser calls of an uncorrected run, per image."""
    full = float(len(schedule.full_steps))
    return {"full": full, "cached": schedule.num_steps - full} if schedule.has_cache else {"full": full}


def overhead_of(extra: Mapping[StepKind, float], schedule: CacheSchedule, costs: Costs) -> float:
    """Return the price of the extra calls as a fraction of that of an uncorrected run."""
    return price(extra, costs) / price(plain_evaluations(schedule), costs)
