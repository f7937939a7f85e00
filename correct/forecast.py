"""Forecast: on a cached step, extrapolate the feature instead of reusing it.

A feature cache reuses F(s) of the last full step s at the steps after it, though the feature moves on. Its
values at the last full steps tell how: a polynomial through them, in the step index, is read at the cached
step. That costs a weighted sum of two or three features, and no evaluation.

Source: TaylorSeer (Liu et al., "From reusing to forecasting", ICCV 2025), brought from the features of a
transformer's layers to the one feature of a UNet's cache. Deviations: Newton's divided differences on the
real positions of the full steps, so intervals need not be equal; the option of HiCache's basis. See
`errata.correct.extrapolation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import CallView, Corrector, CorrectorContext, Evaluation
from errata.correct.extrapolation import Differences, combined, hermite_basis, newton_basis
from errata.correct.validation import is_count, is_number, require
from errata.runtime.schedule import CacheSchedule


@dataclass(frozen=True, kw_only=True)
class Forecast(StoredDataclass):
    """Extrapolates the cached feature at cached steps, at no evaluation.

    Until enough full steps have passed for `order`, the highest order that the known features allow is taken;
    before the second full step that is plain reuse.

    Attributes:
        order: of the polynomial, 1 to 3; it reads the features of `order + 1` full steps. 1 was
            measured to be the best, above all before Hindsight, see docs/correct.md.
        basis: "newton", or "hermite", which damps.
        sigma: contraction of the Hermite basis, in (0, 1]; "newton" has no use for it.

    Raises:
        PlanError: a value outside these ranges.
    """

    order: int = 1
    basis: Literal["newton", "hermite"] = "newton"
    sigma: float = 0.5

    def __post_init__(self) -> None:
        require(is_count(self.order) and 1 <= self.order <= 3, self, "order", "1, 2 or 3")
        require(self.basis in ("newton", "hermite"), self, "basis", '"newton" or "hermite"')
        require(is_number(self.sigma) and 0 < self.sigma <= 1, self, "sigma", "in (0, 1]")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """The cached steps after the second full one; before it there is nothing to extrapolate from."""
        return forecast_steps(schedule)

    def check(self, setting: CorrectorContext) -> None:
        """See `Method.check`: it works with every scheduler."""

    def corrector(self, setting: CorrectorContext) -> Corrector:
        """See `Method.corrector`."""
        return _Forecasting(self, setting)


class _Forecasting(Corrector):
    """Forecast on one run; what it knows is what the run has stored."""

    def __init__(self, choices: Forecast, setting: CorrectorContext) -> None:
        super().__init__(setting)
        self._choices = choices
        self._steps = self.taps
        self.taps = frozenset()  # nothing to do between network and scheduler
        self.remembers = choices.order + 1
        self._differences = [Differences() for _ in range(setting.schedule.calls_per_step)]

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
    """Cached steps before which two full ones have passed, sorted."""
    return cached_steps(schedule, after=schedule.groups[1][0] if len(schedule.groups) > 1 else None)


def cached_steps(schedule: CacheSchedule, *, after: int | None = 0) -> tuple[int, ...]:
    """Cached steps beyond a step, sorted; none where that is None."""
    if after is None:
        return ()
    return tuple(step for step in range(after, schedule.num_steps) if schedule.kind(step) == "cached")
