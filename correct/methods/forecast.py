"""Forecast: on a cached step, extrapolate the feature instead of reusing it.

A feature cache reuses F(s) of the last full step s at the steps after it, although the feature changes. Its
values at the last full steps show how: a polynomial through them, in the step index, is read at the cached
step. That costs a weighted sum of two or three features, and no evaluation.

Source: TaylorSeer (Liu et al., "From reusing to forecasting", ICCV 2025), applied to the one feature of a
UNet's cache instead of the features of a transformer's layers. Deviations: Newton's divided differences on
the real positions of the full steps, so intervals need not be equal; optionally HiCache's basis. See
`errata.correct.extrapolation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import CallView, Corrector, CorrectorContext, Evaluation
from errata.correct.extrapolation import Differences, combined, hermite_basis, newton_basis
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.correct.validation import is_count, is_number, require
from errata.runtime.schedule import CacheSchedule


@register_method
@dataclass(frozen=True, kw_only=True)
class Forecast(StoredDataclass):
    """A forecast: the feature extrapolated at cached steps, at no evaluation.

    Until enough full steps have passed for `order`, it takes the highest order that the known features allow;
    before the second full step that is plain reuse.

    Attributes:
        order: order of the polynomial through features; 1 to 3. It reads the features of `order + 1` full
            steps. 1 was measured to be the best, above all before Hindsight, see docs/correct.md.
        basis: basis of the polynomial; "newton", or "hermite", which damps.
        sigma: contraction of the hermite basis; in (0, 1]. "newton" does not use it.

    Raises:
        PlanError: a value outside these ranges.
    """

    traits = Traits(decides_feature=True)

    order: int = 1
    basis: Literal["newton", "hermite"] = "newton"
    sigma: float = 0.5

    def __post_init__(self) -> None:
        require(is_count(self.order) and 1 <= self.order <= 3, self, "order", "1, 2 or 3")
        require(self.basis in ("newton", "hermite"), self, "basis", '"newton" or "hermite"')
        require(is_number(self.sigma) and 0 < self.sigma <= 1, self, "sigma", "in (0, 1]")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return the cached steps after the second full one; before it there is nothing to extrapolate."""
        return forecast_steps(schedule)

    def check(self, context: CorrectorContext) -> None:
        """Accept every scheduler."""

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _Forecasting(self, context)


class _Forecasting(Corrector):
    """Forecast on one run; its only state is what the run has stored."""

    def __init__(self, choices: Forecast, context: CorrectorContext) -> None:
        super().__init__(context)
        self._choices = choices
        self._steps = self.taps
        self.taps = frozenset()  # nothing to do between network and scheduler
        self.remembers = choices.order + 1
        self._differences = [Differences() for _ in range(context.schedule.calls_per_step)]

    def before_call(self, view: CallView) -> Evaluation | None:
        if view.kind == "full" or view.step not in self._steps or len(view.stored) < 2:
            return None
        newest_first = view.stored[::-1][: self.remembers]
        positions, differences = self._differences[view.stream].of(newest_first)
        if self._choices.basis == "newton":
            basis = newton_basis(positions, view.step)
        else:
            basis = hermite_basis(positions, view.step, sigma=self._choices.sigma)
        feature = combined(basis, differences).to(view.stored[-1][1].dtype)
        return Evaluation(kind="cached", feature=feature, reads=tuple(step for step, _ in newest_first))


def forecast_steps(schedule: CacheSchedule) -> tuple[int, ...]:
    """Return the cached steps that come after two full ones, sorted."""
    return cached_steps(schedule, after=schedule.groups[1][0] if len(schedule.groups) > 1 else None)


def cached_steps(schedule: CacheSchedule, *, after: int | None = 0) -> tuple[int, ...]:
    """Return the cached steps from step `after` on, sorted; none if that is None."""
    if after is None:
        return ()
    return tuple(step for step in range(after, schedule.num_steps) if schedule.kind(step) == "cached")
