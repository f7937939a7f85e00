"""What a corrected run did, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from errata.compress.network.denoiser import Denoiser
from errata.compress.recipes.schedule import StepKind
from errata.correct.corrector import Correction
from errata.errors import ErrataError


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One sampling step.

    Evaluations are those of samples divided by the batch size: one that has left the batch costs nothing.

    Attributes:
        step: index of the denoiser call.
        kind: how the plain run evaluates this step, which counts as one evaluation.
        extra: evaluations that the correction added, by kind; empty where it did nothing.
        iterations: refinements of each sample of the batch; empty where there was none to count.
        residuals: of each sample, one number per refinement.
    """

    step: int
    kind: StepKind
    extra: Mapping[StepKind, float] = field(default_factory=dict)
    iterations: tuple[int, ...] = ()
    residuals: tuple[tuple[float, ...], ...] = ()

    @property
    def evaluations(self) -> dict[StepKind, float]:
        """All evaluations of this step, by kind."""
        return _sum({self.kind: 1.0}, self.extra)


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """All steps of one run."""

    batch_size: int
    steps: tuple[StepStats, ...]

    @property
    def base(self) -> dict[StepKind, float]:
        """Evaluations of the plain run, by kind."""
        return _sum(*({step.kind: 1.0} for step in self.steps))

    @property
    def extra(self) -> dict[StepKind, float]:
        """Evaluations that the correction added, by kind."""
        return _sum(*(step.extra for step in self.steps))

    @property
    def evaluations(self) -> dict[StepKind, float]:
        """All evaluations, by kind."""
        return _sum(self.base, self.extra)

    @property
    def iterations(self) -> tuple[int, ...]:
        """Refinements of each sample, over all steps."""
        counted = [step.iterations for step in self.steps if step.iterations]
        return tuple(map(sum, zip(*counted, strict=True))) if counted else (0,) * self.batch_size


def overhead(stats: RunStats, denoiser: Denoiser) -> float:
    """Σ(extra evaluations x the measured cost of their kind) / Σ(base evaluations x their cost).

    Costs are those of `denoiser` at the run's batch size; the first call at a new shape measures them.
    """
    return _seconds(stats.extra, denoiser, stats.batch_size) / _seconds(
        stats.base, denoiser, stats.batch_size
    )


def step_stats(
    correction: Correction, *, step: int, kind: StepKind, extra: Mapping[StepKind, float], batch_size: int
) -> StepStats:
    """`StepStats` of a corrected step; waits for the device.

    Raises:
        ErrataError: a residual is not finite.
    """
    residuals: list[list[float]] = [[] for _ in range(batch_size)]
    for rows, values in correction.residuals:
        indices = range(batch_size) if rows is None else rows.tolist()
        for index, value in zip(indices, values.tolist(), strict=True):
            residuals[index].append(value)
    if not math.isfinite(sum(map(sum, residuals))):
        broken = [i for i, each in enumerate(residuals) if not math.isfinite(sum(each))]
        raise ErrataError(
            f"step {step}: the denoiser returned NaN or infinite values for sample {broken[0]} "
            f"({len(broken)} of {batch_size} samples were hit); sample in float32, or with "
            'steps="none" to see whether the artifact alone does it too'
        )
    return StepStats(
        step=step,
        kind=kind,
        extra=dict(extra),
        iterations=tuple(map(len, residuals)),
        residuals=tuple(map(tuple, residuals)),
    )


def _seconds(counts: Mapping[StepKind, float], denoiser: Denoiser, batch_size: int) -> float:
    return sum(count * denoiser.cost(kind, batch_size=batch_size) for kind, count in counts.items())


def _sum(*counts: Mapping[StepKind, float]) -> dict[StepKind, float]:
    total: dict[StepKind, float] = {}
    for count in counts:
        for kind, value in count.items():
            total[kind] = total.get(kind, 0.0) + value
    return total
