"""The plans that the planner tries: methods, and where along the run they fit the budget.

Every candidate says how many denoiser calls it adds, so that its price is known before anything is sampled.
A method with a tolerance may take fewer, never more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from errata.correct.corrector import Method
from errata.correct.costs import Costs, overhead_of
from errata.correct.epsilon_scaling import EpsilonScaling
from errata.correct.fitted_forecast import FittedForecast
from errata.correct.forecast import Forecast
from errata.correct.hindsight import Hindsight
from errata.correct.iec import IEC
from errata.correct.lookahead import Lookahead
from errata.correct.planner.placements import Unit, intervals, placements, sampler_steps
from errata.correct.plans import Plan
from errata.correct.refresh import Refresh
from errata.correct.second_order import SecondOrder
from errata.runtime.schedule import CacheSchedule, StepKind

Evaluations = Mapping[StepKind, float]

# Up as for exposure bias, its smallest published value; and down, which compressed models may need instead.
_SCALES = (0.998, 1.004)

# Of what the budget allows, the smaller placement: corrections may do most of their good, or least of their
# harm, at the ends of a run.
_PART = 4

# The budget is a quotient of floating-point numbers.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan to try.

    Attributes:
        name: for people.
        plan: what to do.
        extra: denoiser calls that it adds to an image, at most, by kind; below 0 where it saves some.
    """

    name: str
    plan: Plan
    extra: Evaluations

    @classmethod
    def none(cls) -> Candidate:
        """Correct nothing."""
        return cls(name="none", plan=Plan.none(), extra={})

    def __add__(self, other: Candidate) -> Candidate:
        """Both, this one first."""
        extra = {**self.extra}
        for kind, number in other.extra.items():
            extra[kind] = extra.get(kind, 0.0) + number
        return Candidate(name=f"{self.name} + {other.name}", plan=self.plan + other.plan, extra=extra)


def candidates_for(
    schedule: CacheSchedule, costs: Costs, max_overhead: float, *, fitted: FittedForecast | None = None
) -> list[Candidate]:
    """What the planner tries unless it is told: all within the budget, those that cost nothing first.

    A forecast and hindsight cost nothing, so they are also tried with what corrects a cached run for a price.
    Methods that need guidance or draw noise (DiffIER, Langevin) are not among them. `fitted` is what
    `fit_forecast` made for this schedule; None leaves it out.
    """
    menu = _Menu(schedule, costs, max_overhead)
    scaled = [menu.free(f"EpsilonScaling {scale}", EpsilonScaling(scale=scale)) for scale in _SCALES]
    averaged = [*menu.refinements("SecondOrder", SecondOrder())]
    refined = [*menu.refinements("IEC", IEC())]
    if not schedule.has_cache:
        return [*scaled, *refined, *averaged]
    forecasts = [menu.free(f"Forecast {order}", Forecast(order=order)) for order in (1, 2)]
    back = menu.free("Hindsight", Hindsight())
    both = forecasts[0] + back
    free = [*scaled, *forecasts, back, both, forecasts[1] + back]
    if fitted is not None:
        free += [menu.free("Forecast fitted", fitted), menu.free("Forecast fitted", fitted) + back]
    ahead, refreshed = [*menu.lookaheads(Lookahead())], [*menu.refreshes()]
    combined = [forecasts[0] + each + back for each in ahead]
    combined += [each + both for each in (*refined, *refreshed)]
    return [*free, *refined, *ahead, *refreshed, *averaged, *combined]


def cache_free_plan() -> Plan:
    """Every step in full."""
    return Plan(Refresh(), "all")


class _Menu:
    """Places methods along one schedule, each as often as the budget allows."""

    def __init__(self, schedule: CacheSchedule, costs: Costs, max_overhead: float) -> None:
        self._schedule, self._costs, self._budget = schedule, costs, max_overhead

    def free(self, name: str, method: Method) -> Candidate:
        """Everywhere, at no evaluation."""
        return Candidate(name=name, plan=Plan(method), extra={})

    def refinements(self, name: str, method: Method) -> Iterator[Candidate]:
        """One more full evaluation for each denoiser call of a sampler step."""
        calls = float(self._schedule.calls_per_step)
        units = sampler_steps(method.serves(self._schedule), self._schedule)
        return self._placed(name, method, units, {"full": calls})

    def lookaheads(self, method: Method) -> Iterator[Candidate]:
        """One more full evaluation of a sampler step for each cache interval."""
        calls = float(self._schedule.calls_per_step)
        units = intervals(method.serves(self._schedule), self._schedule)
        return self._placed("Lookahead", method, units, {"full": calls})

    def refreshes(self) -> Iterator[Candidate]:
        """Cached sampler steps in full."""
        calls = float(self._schedule.calls_per_step)
        units = sampler_steps(Refresh().serves(self._schedule), self._schedule)
        return self._placed("Refresh", Refresh(), units, {"full": calls, "cached": -calls})

    def _placed(
        self, name: str, method: Method, units: Sequence[Unit], each: Evaluations
    ) -> Iterator[Candidate]:
        """`each` is what a unit costs. All of the budget, and a quarter of it, which may buy more by unit."""
        affordable = int(self._budget / overhead_of(each, self._schedule, self._costs) + _ROUNDING)
        most = min(affordable, len(units))
        for count in dict.fromkeys((most, most // _PART)):
            extra = {kind: number * count for kind, number in each.items()}
            for place, steps in placements(units, count).items():
                if count == most or place.startswith("ends"):
                    yield Candidate(name=f"{name} at {place}", plan=Plan(method, steps), extra=extra)
