"""FittedForecast: a forecast with weights fitted to the artifact's own runs, see `errata.correct.fitting`.

    symbol      here        meaning
    i           step        a cached denoiser call
    s_0, s_1    reads       the scheduled full calls before it, newest first, of its stream
    F_(s_k)     stored      the features that they left
    w_ik        weights     F_i ≈ Σ_k w_ik F_(s_k)

`Forecast` extrapolates a polynomial far beyond the stored features, where its weights are large and alternate
in sign. Fitted weights are only as large as this network's features need.

Source: this project. Least squares between features of calibration data are CacheQuant's (Liu et al., 2025,
section 3.3), there from one stored feature, by channel, before deployment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import CallView, Corrector, CorrectorContext, Evaluation
from errata.correct.extrapolation import Differences, combined, newton_basis, weighted_sum
from errata.correct.methods.forecast import forecast_steps
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.correct.validation import is_number
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

REFIT = "fit it with errata.correct.fit_forecast(deployed), or let `errata plan` do it"


@register_method
@dataclass(frozen=True, kw_only=True, repr=False)
class FittedForecast(StoredDataclass):
    """A forecast for cached steps: a fitted weighted sum of the last full steps' features, no evaluation.

    `fit_forecast` makes it for one cache schedule. Where a run has stored features of other steps than the
    scheduled ones (the plan refreshed some in between), it reads `Forecast`'s polynomial through them.

    Attributes:
        weights: w_i of every denoiser call, that of the newest feature first; empty where none is forecast.

    Raises:
        PlanError: there are no weights, or they are not finite.
    """

    traits = Traits(decides_feature=True)

    weights: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if isinstance(self.weights, list):  # as JSON has it
            object.__setattr__(self, "weights", tuple(map(_as_tuple, self.weights)))
        rows = self.weights if isinstance(self.weights, tuple) else ()
        if not any(rows) or not all(map(_is_row, rows)):
            raise PlanError(f"FittedForecast needs finite weights for every denoiser call; {REFIT}")

    def __repr__(self) -> str:
        """Return a short form, without the weights."""
        fitted = sum(map(bool, self.weights))
        return f"FittedForecast(order={max(map(len, self.weights)) - 1}, fitted for {fitted} steps)"

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return the cached steps after the second full one, as `Forecast` does."""
        return forecast_steps(schedule)

    def check(self, context: CorrectorContext) -> None:
        """Check that the weights belong to this schedule.

        Raises:
            PlanError: they belong to another one.
        """
        schedule, longest = context.schedule, max(map(len, self.weights))
        asked = [len(reads(step, schedule, most=longest)) for step in range(schedule.num_steps)]
        served = self.serves(schedule)
        if [len(row) for row in self.weights] != [n if i in served else 0 for i, n in enumerate(asked)]:
            raise PlanError(
                f"this FittedForecast was fitted for another cache schedule, of {len(self.weights)} denoiser "
                f"calls; here are {schedule.num_steps}, {len(schedule.full_steps)} of them full: {REFIT}"
            )

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _Weighting(self, context)


class _Weighting(Corrector):
    """FittedForecast on one run; its only state is what the run has stored."""

    def __init__(self, choices: FittedForecast, context: CorrectorContext) -> None:
        super().__init__(context)
        self._weights = choices.weights
        self._steps = self.taps
        self.taps = frozenset()  # nothing to do between network and scheduler
        self.remembers = max(map(len, choices.weights))
        self._differences = [Differences() for _ in range(context.schedule.calls_per_step)]

    def before_call(self, view: CallView) -> Evaluation | None:
        if view.kind == "full" or view.step not in self._steps or len(view.stored) < 2:
            return None
        weights = self._weights[view.step]
        newest_first = view.stored[::-1][: len(weights)]
        steps = tuple(step for step, _ in newest_first)
        if steps == reads(view.step, self.context.schedule, most=len(weights)):
            feature = weighted_sum(weights, [feature for _, feature in newest_first])
        else:
            positions, differences = self._differences[view.stream].of(newest_first)
            feature = combined(newton_basis(positions, view.step), differences)
        return Evaluation(kind="cached", feature=feature.to(view.stored[-1][1].dtype), reads=steps)


def reads(step: int, schedule: CacheSchedule, *, most: int) -> tuple[int, ...]:
    """Return the last scheduled full calls before a call, of its stream, newest first; at most `most`."""
    stream = schedule.stream(step)
    before = [full for full in schedule.full_steps if full < step and schedule.stream(full) == stream]
    return tuple(before[::-1][:most])


def _as_tuple(row: Any) -> Any:
    return tuple(row) if isinstance(row, list) else row


def _is_row(row: Any) -> bool:
    return isinstance(row, tuple) and all(is_number(w) and math.isfinite(w) for w in row)
