"""Lookahead: evaluate once in the middle of what is coming, and interpolate the feature over it.

After a full step s, its prediction carries the sample to a later step m of the interval in one DDIM step. The
network is evaluated in full there, and the feature of the cached steps between s and the next full step is
read off the line through F(s) and F(m). One full evaluation an interval, like IEC's; the sample at m is used
for its feature and thrown away.

    symbol      here                    meaning
    s, e        group                   a full step, and the next one (or the end of the run)
    m           middle                  s + position (e - s), in whole steps
    x_m         levels.jump(…)          the sample at m, as one deterministic step from s would have it
    F           features                of the cache

Source: this project. Where the features of the last full steps are extrapolated instead, see `Forecast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import (
    CallView,
    Corrector,
    CorrectorContext,
    Evaluation,
    Features,
    Method,
    StepView,
)
from errata.correct.extrapolation import Differences, combined, newton_basis
from errata.correct.fitted_forecast import FittedForecast
from errata.correct.forecast import Forecast, cached_steps
from errata.correct.refresh import Refresh
from errata.correct.validation import is_count, is_number, require
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule


@dataclass(frozen=True, kw_only=True)
class Lookahead(StoredDataclass):
    """Interpolates the cached feature at cached steps, for one full evaluation an interval.

    An interval costs its evaluation when any of its cached steps is selected.

    Attributes:
        position: where in the interval the network is evaluated, in (0, 1]; rounded to a step between the two
            full ones.
        order: 1, a line through the full step and that point; 2, a parabola through the point of the interval
            before as well, where there is one.

    Raises:
        PlanError: a value outside these ranges.
    """

    position: float = 0.5
    order: int = 1

    def __post_init__(self) -> None:
        require(is_number(self.position) and 0 < self.position <= 1, self, "position", "in (0, 1]")
        require(is_count(self.order) and self.order in (1, 2), self, "order", "1 or 2")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """The cached steps."""
        return cached_steps(schedule)

    def check(self, setting: CorrectorContext) -> None:
        """See `Method.check`.

        Raises:
            PlanError: the scheduler's noise levels are not known, so nothing says where a step would lead.
        """
        if setting.levels is None:
            raise PlanError(
                "Lookahead needs the noise level of every step, which is not known for this scheduler; "
                "choose Forecast, which needs none"
            )

    def corrector(self, setting: CorrectorContext) -> Corrector:
        """See `Method.corrector`."""
        return _LookingAhead(self, setting)


class _LookingAhead(Corrector):
    """Lookahead on one run; keeps the latest points at which it looked."""

    def __init__(self, choices: Lookahead, setting: CorrectorContext) -> None:
        super().__init__(setting)
        assert setting.levels is not None  # checked when the plan was wrapped
        self._levels = setting.levels
        self._steps = self.taps
        self._calls = setting.schedule.calls_per_step
        self._kept = choices.order
        self._points: list[tuple[int, Features]] = []
        self._differences = [Differences() for _ in range(self._calls)]
        starts = [start for start, _ in setting.schedule.groups]
        self._before = dict(zip(starts, [0, *starts[:-1]], strict=True))  # the interval before each
        self._middles = {
            start: self._middle(start, end, choices.position)
            for start, end in setting.schedule.groups
            if self._steps.intersection(range(start, end))
        }
        self.taps = frozenset(self._middles)

    def at_step(self, view: StepView) -> None:
        middle = self._middles[view.step]
        ahead = self._levels.jump(view.sample, view.prediction, view.step, middle)
        _, features = view.evaluate(ahead, step=middle)
        near = [point for point in self._points if point[0] > self._before[view.step]]
        self._points = [*near, (middle, features)][-self._kept :]

    def before_call(self, view: CallView) -> Evaluation | None:
        if view.kind == "full" or view.step not in self._steps:
            return None
        at = view.step - view.stream  # a point stands for all calls of its sampling step
        start, here = view.stored[-1]
        points = [(middle, features[view.stream]) for middle, features in reversed(self._points)]
        stored = (start - view.stream, here)
        # The stored feature is of a middle where that step was refreshed.
        known = [stored, *(point for point in points if point[0] != stored[0])]
        if len(known) < 2:
            return None
        positions, differences = self._differences[view.stream].of(known)
        feature = combined(newton_basis(positions, at), differences).to(here.dtype)
        return Evaluation(kind="cached", feature=feature, reads=tuple(step for step, _ in known))

    def _middle(self, start: int, end: int, position: float) -> int:
        steps = (end - start) // self._calls  # of the sampler
        last = steps if end < self.setting.schedule.num_steps else steps - 1
        return start + self._calls * min(max(1, round(position * steps)), last)


def check_effect(placed: Sequence[tuple[Method, tuple[int, ...]]], schedule: CacheSchedule) -> None:
    """Refuses a plan that pays for looking ahead in an interval, of which other methods decide every step.

    Raises:
        PlanError: it names the interval.
    """
    for place, (method, steps) in enumerate(placed):
        if not isinstance(method, Lookahead):
            continue
        taken = {
            step
            for other, (rival, rivals_steps) in enumerate(placed)
            if isinstance(rival, Refresh)
            or (isinstance(rival, Forecast | FittedForecast | Lookahead) and other > place)
            for step in rivals_steps
        }
        for start, end in schedule.groups:
            chosen = {step for step in steps if start < step < end}
            if chosen and chosen <= taken:
                raise PlanError(
                    f"Lookahead would pay an evaluation for steps {min(chosen)} to {max(chosen)}, but other "
                    "methods of the plan decide all of them: put Lookahead behind Forecast, or give them "
                    "different steps"
                )
