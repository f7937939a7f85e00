"""Hindsight: at a full step, take back what the cached steps before it got wrong.

Between two full steps a cached feature goes stale, whether it is reused or extrapolated, and the error of the
prediction grows with the distance from the full step. The next full step shows how large it had become: there
the prediction jumps. An error of known size at its end and of known shape before it can be summed over the
interval, with the weights that the sampler gave to each step, and taken out of the sample. No evaluation is
needed, only what the run has seen anyway.

    symbol      here            meaning
    s, e        origin, step    a full step, and the next one
    a_i, b_i    signal, noise   x_i = a_i x_0 + b_i ε
    ε_i         (predictions)   of the sampling steps
    J           jump            ε_e - ε̂_e, the error at the end of the interval; ε̂_e continues the cached
                                predictions: ε_(e-1) after reuse, 2 ε_(e-1) - ε_(e-2) after a forecast
    u           share           (i - s) / (e - s)
    w(u)        shape(…)        Π_(k=0..q) (u + k) / (q + 1)!: the error of a polynomial of order q through
                                full steps at equal distances, 1 at u = 1; q = 0 is reuse, w = u
    γ           gain            how much of it is taken back
    Δ_e         shift           γ a_e Σ_(s<i<e) (b_(i+1)/a_(i+1) - b_i/a_i) w(u_i) J

A step from x_i carries b_(i+1)/a_(i+1) - b_i/a_i of its prediction into x/a, so Δ_e is what the sample lacks.
It is added to the next sample, as (a_(e+1)/a_e) Δ_e. The last interval has no full step after it, and keeps
its error.

Source: this project. It assumes a deterministic sampler; one that adds noise at every step forgets part of
the error by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from errata.compress.recipes.schedule import CacheSchedule
from errata.correct.choices import is_count, is_number, require
from errata.correct.config_json import fields_of
from errata.correct.corrector import CallView, Correction, Corrector, Evaluation, Setting, StepView
from errata.correct.noise_levels import required


@dataclass(frozen=True, kw_only=True)
class Hindsight:
    """Takes back the error of the cached steps at the full step that follows them, at no evaluation.

    Attributes:
        order: of the `Forecast` that it follows, as in `Plan(Forecast(order=1)) + Plan(Hindsight(order=1))`;
            0 where features are reused.
        gain: γ, in (0, 1]: how much of the error is taken back.

    Raises:
        PlanError: a value outside these ranges.
    """

    order: int = 0
    gain: float = 1.0

    def __post_init__(self) -> None:
        require(is_count(self.order) and 0 <= self.order <= 3, self, "order", "0, 1, 2 or 3")
        require(is_number(self.gain) and 0 < self.gain <= 1, self, "gain", "in (0, 1]")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """The full steps that follow a cached one."""
        calls = schedule.calls_per_step
        return tuple(step for step in schedule.full_steps if step and schedule.kind(step - calls) == "cached")

    def check(self, setting: Setting) -> None:
        """See `Method.check`.

        Raises:
            PlanError: the scheduler's noise levels are not known.
        """
        required(setting.levels, self, setting.steps)

    def corrector(self, setting: Setting) -> Corrector:
        """See `Method.corrector`."""
        return _LookingBack(self, setting)

    def to_json(self) -> dict[str, Any]:
        """See `Method.to_json`."""
        return {"type": "Hindsight", "version": 1, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Hindsight:
        """Inverse of `to_json`.

        Raises:
            PlanError: another type or version, a missing or an unknown key, a value out of range.
        """
        return cls(**fields_of(cls, value, version=1))


class _LookingBack(Corrector):
    """Hindsight on one run; keeps the predictions right before each full step."""

    def __init__(self, choices: Hindsight, setting: Setting) -> None:
        super().__init__(setting)
        self._choices = choices
        self._levels = required(setting.levels, choices, setting.steps)
        self._calls = setting.schedule.calls_per_step
        self._judged = frozenset(step - step % self._calls for step in setting.steps)
        self._reach = 2 if choices.order else 1  # cached predictions that are continued
        before = {step - self._calls * back for step in self._judged for back in range(1, self._reach + 1)}
        self.taps = self._judged | before
        self._known = 0  # full evaluations so far, which limit the order of an extrapolation
        self._origin = 0
        self._cached: list[Tensor] = []  # predictions of the latest cached steps

    def before_call(self, view: CallView) -> Evaluation | None:
        if view.stream == 0 and view.kind == "full":
            self._origin = view.stored[-1][0] if view.stored else 0
            self._known += 1
        return None

    def at_step(self, view: StepView) -> Correction | None:
        epsilon = self._levels.epsilon(view.sample, view.prediction, view.step)
        if view.kind == "cached":
            self._cached = [*self._cached, epsilon][-self._reach :]
            return None
        cached, self._cached = self._cached, []
        if view.step not in self._judged or not cached:
            return None
        continued = 2 * cached[-1] - cached[-2] if len(cached) == 2 else cached[-1]
        weight = self._choices.gain * self._weight(self._origin, view.step)
        return Correction(prediction=view.prediction, shift=(epsilon - continued) * weight)

    def _weight(self, start: int, end: int) -> float:
        """What the next sample lacks, as a multiple of the jump."""
        a, b = (*self._levels.signal, 1.0), (*self._levels.noise, 0.0)
        order = min(self._choices.order, self._known - 2)
        total = 0.0
        for step in range(start + self._calls, end, self._calls):
            moved = b[step + self._calls] / a[step + self._calls] - b[step] / a[step]
            total += moved * shape((step - start) / (end - start), order=order)
        # From x/a at the full step to the sample after it: the step there multiplies by a_(e+1) / a_e.
        return total * a[end + self._calls]


def shape(share: float, *, order: int) -> float:
    """w(u), for u in [0, 1]."""
    return math.prod(share + k for k in range(order + 1)) / math.factorial(order + 1)
