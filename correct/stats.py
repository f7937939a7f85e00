"""What a corrected run did, and what that cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from errata.correct.corrector import Correction, Rows
from errata.correct.costs import price
from errata.errors import ErrataError
from errata.runtime.denoiser import Denoiser
from errata.runtime.run import Run, UNetCall
from errata.runtime.schedule import CacheSchedule, StepKind


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """One denoiser call of the plain run; where a sampling step takes two, the first one has its corrections.

    Evaluations are counted per sample and divided by the batch size: a sample that has left the batch costs
    nothing.

    Attributes:
        step: index of the denoiser call.
        kind: how the plain run evaluates this step, which counts as one evaluation.
        extra: evaluations that the correction added, by kind; empty if it did nothing. Negative where it
            replaced a plain one: a cached step evaluated in full has one full evaluation more and one cached
            evaluation less.
        iterations: refinements of each sample of the batch; empty if nothing was refined.
        residuals: for each sample, one number per refinement.
        diverged: the samples that the guard stopped because the next iterate moved further than the first
            one had. A residual that grows again after it has fallen is rounding, and does not count.
        notes: further numbers of the method by name, one for each sample. For IEC, "guarded" is 1 where the
            guard stopped a sample, for any growth.
    """

    step: int
    kind: StepKind
    extra: Mapping[StepKind, float] = field(default_factory=dict)
    iterations: tuple[int, ...] = ()
    residuals: tuple[tuple[float, ...], ...] = ()
    diverged: tuple[bool, ...] = ()
    notes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def evaluations(self) -> dict[StepKind, float]:
        """All evaluations of this step, by kind."""
        return {kind: count for kind, count in _sum({self.kind: 1.0}, self.extra).items() if count}


@dataclass(frozen=True, kw_only=True)
class RunStats:
    """All steps of one run.

    Attributes:
        batch_size: of the network's batch; guidance may put every image into it twice.
    """

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
        """Refinements of each sample over all steps; empty if nothing was refined."""
        counted = [step.iterations for step in self.steps if step.iterations]
        return tuple(map(sum, zip(*counted, strict=True)))

    @property
    def diverged(self) -> int:
        """How often a sample diverged, over all steps."""
        return sum(map(sum, (step.diverged for step in self.steps)))


def overhead(stats: RunStats, denoiser: Denoiser) -> float:
    """Return Σ(extra evaluations x the measured cost of their kind) / Σ(base evaluations x their cost).

    Costs are those of `denoiser` at the run's batch size; the first call at a new shape measures them.
    """
    kinds = stats.base | stats.extra
    costs = {kind: denoiser.cost(kind, batch_size=stats.batch_size) for kind in kinds}
    return price(stats.extra, costs) / price(stats.base, costs)


def run_stats(run: Run, corrected: Mapping[int, StepStats]) -> RunStats:
    """Return the stats of a finished run, some of whose steps were corrected."""
    schedule = run.denoiser.schedule
    steps = tuple(
        corrected.get(step)
        or StepStats(step=step, kind=schedule.kind(step), extra=changed_kind(schedule.kind(step), made))
        for step, made in enumerate(run.kinds)
    )
    return RunStats(batch_size=run.latest[-1].sample.shape[0] if run.latest else 0, steps=steps)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a correction left behind at one step, still on its device.

    Attributes:
        steps: the denoiser calls of this sampling step.
        scheduled: how the plain run makes them.
        made: how they were made.
        extra: further evaluations.
        residuals: for each iteration of each method, as in `Correction`.
        diverged: for each method that tells, which samples diverged, `(B,)`, bool.
        notes: further numbers by name, each `(B,)`.
        is_finite: whether each sample's corrected prediction is, `(B,)`, bool; None without a correction.
    """

    steps: tuple[int, ...]
    scheduled: tuple[StepKind, ...]
    made: tuple[StepKind, ...]
    extra: Mapping[StepKind, float]
    batch_size: int
    residuals: Sequence[tuple[Rows, Tensor]] = ()
    diverged: Sequence[Tensor] = ()
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    is_finite: Tensor | None = None

    @classmethod
    def of(
        cls,
        calls: Sequence[UNetCall],
        corrections: Sequence[Correction],
        extra: Mapping[StepKind, float],
        *,
        schedule: CacheSchedule,
        batch_size: int,
    ) -> StepRecord:
        """Return the record of a step at which `corrections` were made, with `extra` evaluations."""
        return cls(
            steps=tuple(call.step for call in calls),
            scheduled=tuple(schedule.kind(call.step) for call in calls),
            made=tuple(call.kind for call in calls),
            extra=extra,
            batch_size=batch_size,
            residuals=[entry for each in corrections for entry in each.residuals],
            diverged=[each.diverged for each in corrections if each.diverged is not None],
            notes={name: values for each in corrections for name, values in each.notes.items()},
            is_finite=is_whole(corrections[-1].prediction) if corrections else None,
        )

    def stats(self) -> tuple[StepStats, ...]:
        """Return the stats of each call, extra evaluations with the first one; wait for the device.

        Raises:
            ErrataError: a prediction or a residual is not finite.
        """
        self._check_finite()
        each = [
            StepStats(step=step, kind=plain, extra=changed_kind(plain, kind))
            for step, plain, kind in zip(self.steps, self.scheduled, self.made, strict=True)
        ]
        residuals = self._residuals()
        diverged = [each.tolist() for each in self.diverged]
        each[0] = StepStats(
            step=each[0].step,
            kind=each[0].kind,
            extra=_sum(each[0].extra, self.extra),
            iterations=tuple(map(len, residuals)),
            residuals=residuals,
            diverged=tuple(map(any, zip(*diverged, strict=True))) if diverged else (),
            notes={name: tuple(values.tolist()) for name, values in self.notes.items()},
        )
        return tuple(each)

    def _residuals(self) -> tuple[tuple[float, ...], ...]:
        refined = self.residuals
        residuals: list[list[float]] = [[] for _ in range(self.batch_size)]
        for rows, values in refined:
            for index, value in _by_sample(rows, values):
                residuals[index].append(value)
        return tuple(map(tuple, residuals)) if refined else ()

    def _check_finite(self) -> None:
        whole = [True] * self.batch_size if self.is_finite is None else self.is_finite.tolist()
        for rows, values in self.residuals:
            for index, value in _by_sample(rows, values):
                whole[index] = whole[index] and math.isfinite(value)
        check_finite(self.steps[0], whole)


def check_finite(step: int, whole: Sequence[bool]) -> None:
    """Check that all samples of a step are `whole`.

    Raises:
        ErrataError: one is not; the message names the step and the first such sample.
    """
    if not all(whole):
        raise ErrataError(
            f"step {step}: the denoiser returned NaN or infinite values for sample {whole.index(False)} "
            f"({whole.count(False)} of {len(whole)} samples were hit); sample in float32, or without "
            "correction to see whether the artifact alone does it too"
        )


def is_whole(batch: Tensor) -> Tensor:
    """Return whether all values of each sample are finite, `(B,)`, bool."""
    return batch.isfinite().flatten(1).all(1)


def _by_sample(rows: Rows, values: Tensor) -> Iterable[tuple[int, float]]:
    """Return pairs of sample and number; `rows` and `values` as in `Correction.residuals`."""
    numbers = values.tolist()
    if rows is None:
        return enumerate(numbers)
    if rows.dtype == torch.bool:
        return [each for each, is_in in zip(enumerate(numbers), rows.tolist(), strict=True) if is_in]
    return zip(rows.tolist(), numbers, strict=True)


def changed_kind(scheduled: StepKind, made: StepKind) -> dict[StepKind, float]:
    """Return what an evaluation adds and takes away that was made otherwise than scheduled."""
    return {} if scheduled == made else {made: 1.0, scheduled: -1.0}


def _sum(*counts: Mapping[StepKind, float]) -> dict[StepKind, float]:
    total: dict[StepKind, float] = {}
    for count in counts:
        for kind, value in count.items():
            total[kind] = total.get(kind, 0.0) + value
    return total
