"""Hindsight: at a full step, take back what the cached steps before it got wrong.

Between two full steps a cached feature goes stale, whether it is reused or extrapolated, and the error of the
prediction grows with the distance from the full step. The next full step shows how large it has become: the
prediction jumps there. The size of the error at its end and its shape before that are known, so it can be
summed over the interval, with the weight that the sampler gave to each step, and taken out of the sample. No
evaluation is needed, only what the run has seen anyway.

    symbol      here            meaning
    s, e        origin, step    a full step, and the next one
    a_i, b_i    signal, noise   x_i = a_i x_0 + b_i ε
    ε_i         (predictions)   of the sampling steps
    J           jump            ε_e - ε̂_e, the error at the end of the interval; ε̂_e continues the cached
                                predictions: ε_(e-1) after reuse, 2 ε_(e-1) - ε_(e-2) after a forecast
    s_k         reads           steps of the features that a cached step reads: only s with reuse, more with a
                                `Forecast` or a `Lookahead`
    w_i         growth(…)       Π_k (i - s_k) / (e - s_k), the error of a polynomial through the s_k; 1 at e
    γ           gain            how much of it is taken back
    Δ_e         shift           γ a_e Σ_(s<i<e) (b_(i+1)/a_(i+1) - b_i/a_i) w_i J

A step from x_i carries b_(i+1)/a_(i+1) - b_i/a_i of its prediction into x/a, so Δ_e is what the sample lacks.
It is added to the next sample, as (a_(e+1)/a_e) Δ_e. The last interval has no full step after it, and keeps
its error, unless the plan refreshes a step in it.

Source: this project. It assumes a deterministic sampler; one that adds noise at every step forgets part of
the error by itself. It assumes that the error of a `FittedForecast` grows like that of a polynomial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import (
    CallView,
    Correction,
    Corrector,
    CorrectorContext,
    Evaluation,
    StepView,
)
from errata.correct.noise_levels import required
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.correct.validation import is_number, require
from errata.runtime.schedule import CacheSchedule


@register_method
@dataclass(frozen=True, kw_only=True)
class Hindsight(StoredDataclass):
    """Correction of the cached steps' error at the full step that follows them, at no evaluation.

    Put it after the method that it corrects: `Plan(Forecast(order=1)) + Plan(Hindsight())`.

    Attributes:
        gain: share of the error to take back; γ in (0, 1].

    Raises:
        PlanError: a value outside this range.
    """

    traits = Traits(shifts_sample=True, judges_features=True, needs_noise_levels=True)

    gain: float = 1.0

    def __post_init__(self) -> None:
        require(is_number(self.gain) and 0 < self.gain <= 1, self, "gain", "in (0, 1]")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return the full steps that follow a cached one."""
        calls = schedule.calls_per_step
        return tuple(
            step for step in schedule.full_steps if step >= calls and schedule.kind(step - calls) == "cached"
        )

    def check(self, context: CorrectorContext) -> None:
        """Check that no step is pure noise."""
        required(context.levels, self, context.steps)

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _LookingBack(self, context)


class _LookingBack(Corrector):
    """Hindsight on one run; it keeps the predictions right before each full step."""

    def __init__(self, choices: Hindsight, context: CorrectorContext) -> None:
        super().__init__(context)
        self._choices = choices
        self._levels = required(context.levels, choices, context.steps)
        self._calls = context.schedule.calls_per_step
        self._judged = _judged(context)
        before = {step - self._calls * back for step in self._judged for back in (1, 2)}
        self.taps = self._judged | before
        self._reads: dict[int, tuple[int, ...]] = {}  # of the cached steps since the last full one
        self._latest: dict[int, tuple[int, ...]] = {}
        self._cached: list[Tensor] = []  # predictions of the last two cached steps

    def before_call(self, view: CallView) -> Evaluation | None:
        if view.stream == 0:
            if view.kind == "cached" and view.step not in self.context.refreshed:
                self._latest[view.step] = view.reads
            else:
                self._reads, self._latest = self._latest, {}
        return None

    def at_step(self, view: StepView) -> Correction | None:
        wide = torch.promote_types(view.sample.dtype, torch.float32)
        epsilon = self._levels.epsilon(view.sample.to(wide), view.prediction, view.step)
        if view.kind == "cached":
            self._cached = [*self._cached, epsilon][-2:]
            return None
        cached, self._cached = self._cached, []
        if view.step not in self._judged or not cached:
            return None
        is_extrapolated = len(self._reads[view.step - self._calls]) > 1
        continued = 2 * cached[-1] - cached[-2] if is_extrapolated and len(cached) == 2 else cached[-1]
        weight = self._choices.gain * self._weight(view.step)
        return Correction(prediction=view.prediction, shift=(epsilon - continued) * weight)

    def _weight(self, end: int) -> float:
        """Return what the next sample lacks, as a multiple of the jump."""
        a, b = (*self._levels.signal, 1.0), (*self._levels.noise, 0.0)
        total = 0.0
        for step, reads in self._reads.items():
            ahead = step + self._calls
            total += (b[ahead] / a[ahead] - b[step] / a[step]) * growth(step, end, reads)
        # From x/a at the full step to the sample after it: the step there multiplies by a_(e+1) / a_e.
        return total * a[end + self._calls]


def _judged(context: CorrectorContext) -> frozenset[int]:
    """Return where errors are taken back: the selected full steps, and refreshed steps in their intervals.

    No full step follows the cached steps after the last scheduled full one. Steps refreshed there are judged
    if that last one is selected.
    """
    judged = {step for step in context.steps if context.schedule.stream(step) == 0}
    starts = [start for start, _ in context.schedule.groups]
    for step in context.refreshed:
        closing = next((start for start in starts if start > step), starts[-1])
        if context.schedule.stream(step) == 0 and closing in context.steps:
            judged.add(step)
    return frozenset(judged)


def growth(step: int, end: int, reads: tuple[int, ...]) -> float:
    """Return w_i: the error at a step of a polynomial through the values at `reads`; that at `end` is 1.

    It is 0 where the polynomial goes through the value at `end`, which then says nothing about the error.
    """
    if end in reads:
        return 0.0
    return math.prod((step - read) / (end - read) for read in reads)
