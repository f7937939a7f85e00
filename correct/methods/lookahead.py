"""Lookahead: evaluate once in the middle of the coming interval, and interpolate the feature over it.

After a full step s, one DDIM step with its prediction carries the sample to a later step m of the interval.
The network is evaluated in full there. The feature of the cached steps between s and the next full step is
read off the line through F(s) and F(m). That costs one full evaluation an interval, like IEC. The sample at m
is used only for its feature.

    symbol      here                    meaning
    s, e        group                   a full step, and the next one (or the end of the run)
    m           middle                  s + position (e - s), in whole steps
    x_m         levels.jump(…)          the sample at m, after one deterministic step from s
    F           features                of the cache

Source: this project. `Forecast` extrapolates the features of the last full steps instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import (
    CallView,
    Corrector,
    CorrectorContext,
    Evaluation,
    Features,
    StepView,
)
from errata.correct.extrapolation import Differences, combined, newton_basis
from errata.correct.methods.forecast import cached_steps
from errata.correct.noise_levels import check_known
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.correct.validation import is_count, is_number, require
from errata.runtime.schedule import CacheSchedule


@register_method
@dataclass(frozen=True, kw_only=True)
class Lookahead(StoredDataclass):
    """Interpolation of the feature at cached steps, for one full evaluation an interval.

    An interval costs its evaluation if any of its cached steps is selected.

    Attributes:
        position: where in the interval to evaluate, 1 being its end; in (0, 1], rounded to a step between the
            two full ones.
        order: order of the polynomial through features; 1, a line through the full step and that point, or 2,
            a parabola that also goes through the point of the interval before, if there is one.

    Raises:
        PlanError: a value outside these ranges.
    """

    traits = Traits(decides_feature=True, evaluates_intervals=True, needs_noise_levels=True)

    position: float = 0.5
    order: int = 1

    def __post_init__(self) -> None:
        require(is_number(self.position) and 0 < self.position <= 1, self, "position", "in (0, 1]")
        require(is_count(self.order) and self.order in (1, 2), self, "order", "1 or 2")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return the cached steps."""
        return cached_steps(schedule)

    def check(self, context: CorrectorContext) -> None:
        """Check that the noise levels are known: they say where a step would lead."""
        check_known(context.levels, self)

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _LookingAhead(self, context)


class _LookingAhead(Corrector):
    """Lookahead on one run; it keeps the latest points at which it evaluated."""

    def __init__(self, choices: Lookahead, context: CorrectorContext) -> None:
        super().__init__(context)
        self._levels = check_known(context.levels, choices)
        self._steps = self.taps
        self._calls = context.schedule.calls_per_step
        self._kept = choices.order
        self._points: list[tuple[int, Features]] = []
        self._differences = [Differences() for _ in range(self._calls)]
        starts = [start for start, _ in context.schedule.groups]
        self._before = dict(zip(starts, [0, *starts[:-1]], strict=True))  # the interval before each
        self._middles = {
            start: self._middle(start, end, choices.position)
            for start, end in context.schedule.groups
            if self._steps.intersection(range(start, end))
        }
        self.taps = frozenset(self._middles)

    def at_step(self, view: StepView) -> None:
        # Jump to the middle of the interval, and evaluate there.
        middle = self._middles[view.step]
        ahead = self._levels.jump(view.sample, view.prediction, view.step, middle)
        _, features = view.evaluate(ahead, step=middle)
        # Keep the feature, and that of the interval before; older ones are too far away.
        near = [point for point in self._points if point[0] > self._before[view.step]]
        self._points = [*near, (middle, features)][-self._kept :]

    def before_call(self, view: CallView) -> Evaluation | None:
        if view.kind == "full" or view.step not in self._steps:
            return None
        # The known features, newest first: the points of the middles, and the one that the cache stores.
        at = view.step - view.stream  # a point stands for all calls of its sampling step
        start, here = view.stored[-1]
        points = [(middle, features[view.stream]) for middle, features in reversed(self._points)]
        stored = (start - view.stream, here)
        # Where the plan refreshed a middle, the stored feature is of the same step.
        known = [stored, *(point for point in points if point[0] != stored[0])]
        if len(known) < 2:
            return None
        # Read the polynomial through them at this step.
        positions, differences = self._differences[view.stream].of(known)
        feature = combined(newton_basis(positions, at), differences).to(here.dtype)
        return Evaluation(kind="cached", feature=feature, reads=tuple(step for step, _ in known))

    def _middle(self, start: int, end: int, position: float) -> int:
        steps = (end - start) // self._calls  # of the sampler
        last = steps if end < self.context.schedule.num_steps else steps - 1
        return start + self._calls * min(max(1, round(position * steps)), last)
