"""The plans that the planner tries: methods, and where along the run they fit the budget.

Every candidate says how many denoiser calls it adds, so that its price is known before sampling. A method
with a tolerance may take fewer, never more.

A unit is what is corrected at one price: the denoiser calls of a sampler step, or of a cache interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from errata.correct.corrector import Method
from errata.correct.costs import Costs, overhead_of
from errata.correct.methods.epsilon_scaling import EpsilonScaling
from errata.correct.methods.fitted_forecast import FittedForecast
from errata.correct.methods.forecast import Forecast
from errata.correct.methods.hindsight import Hindsight
from errata.correct.methods.iec import IEC
from errata.correct.methods.lookahead import Lookahead
from errata.correct.methods.refresh import Refresh
from errata.correct.methods.second_order import SecondOrder
from errata.correct.methods.sheet import Sheet
from errata.correct.plans import Plan
from errata.correct.steps import spelled
from errata.runtime.schedule import CacheSchedule, StepKind

Unit = tuple[int, ...]
Evaluations = Mapping[StepKind, float]

# Up, as against exposure bias (the smallest published value), and down, which compressed models may need.
_SCALES = (0.998, 1.004)

# The smaller placement, as a part of what the budget allows: corrections may help most, or hurt least, at the
# ends of a run.
_PART = 4

# The budget is a quotient of floating-point numbers.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan to try.

    Attributes:
        name: for logs and messages.
        plan: what to do.
        extra: most denoiser calls that it adds to an image, by kind; negative where it saves some.
    """

    name: str
    plan: Plan
    extra: Evaluations

    @classmethod
    def none(cls) -> Candidate:
        """Return the candidate that corrects nothing."""
        return cls(name="none", plan=Plan.none(), extra={})

    def __add__(self, other: Candidate) -> Candidate:
        """Return a candidate that does both, this one first."""
        extra = {**self.extra}
        for kind, number in other.extra.items():
            extra[kind] = extra.get(kind, 0.0) + number
        return Candidate(name=f"{self.name} + {other.name}", plan=self.plan + other.plan, extra=extra)


def candidates_for(
    schedule: CacheSchedule, costs: Costs, max_overhead: float, *, fitted: FittedForecast | None = None
) -> list[Candidate]:
    """Return what the planner tries by default: all within the budget, those that cost nothing first.

    Forecast and Hindsight cost nothing, so they are also tried together with methods that cost something.
    Methods that need guidance or draw noise (DiffIER, Langevin) are left out. `fitted` is what `fit_forecast`
    made for this schedule; None leaves it out.
    """
    # What any artifact can use: a scaled prediction, or one more evaluation at some full steps.
    menu = _Menu(schedule, costs, max_overhead)
    scaled = [menu.free(f"EpsilonScaling {scale}", EpsilonScaling(scale=scale)) for scale in _SCALES]
    averaged = [*menu.refinements("SecondOrder", SecondOrder())]
    refined = [*menu.refinements("IEC", IEC())]
    if not schedule.has_cache:
        return [*scaled, *refined, *averaged]
    # With a cache: other features, at no evaluation.
    forecasts = [menu.free(f"Forecast {order}", Forecast(order=order)) for order in (1, 2)]
    back = menu.free("Hindsight", Hindsight())
    both = forecasts[0] + back
    free = [*scaled, *forecasts, back, both, forecasts[1] + back]
    if fitted is not None:
        free += [menu.free("Forecast fitted", fitted), menu.free("Forecast fitted", fitted) + back]
    # Other features for an evaluation each, and both together with what costs nothing.
    ahead, refreshed = [*menu.lookaheads(Lookahead())], [*menu.refreshes()]
    combined = [forecasts[0] + each + back for each in ahead]
    combined += [each + both for each in (*refined, *refreshed)]
    return [*free, *refined, *ahead, *refreshed, *averaged, *combined]


def with_sheets(candidates: Sequence[Candidate], sheets: Sequence[Sheet]) -> list[Candidate]:
    """Return the candidates, and for each sheet: the sheet alone, and with the plan that it was fitted under.

    A sheet costs nothing. With other methods than those of its fit it would meet other errors.
    """
    added = []
    for number, sheet in enumerate(sheets, start=1):
        name = "Sheet" if len(sheets) == 1 else f"Sheet {number}"
        added.append(Candidate(name=name, plan=Plan(sheet), extra={}))
        added += [
            Candidate(name=f"{name} + {each.name}", plan=Plan(sheet) + each.plan, extra=each.extra)
            for each in candidates
            if [method.to_json() for method, _ in each.plan.parts if method] == list(sheet.facts.plan)
        ]
    return [*added, *candidates]


def cache_free_plan() -> Plan:
    """Return the plan that makes every step in full."""
    return Plan(Refresh(), "all")


class _Menu:
    """Candidates on one schedule, each method as often as the budget allows."""

    def __init__(self, schedule: CacheSchedule, costs: Costs, max_overhead: float) -> None:
        self._schedule, self._costs, self._budget = schedule, costs, max_overhead

    def free(self, name: str, method: Method) -> Candidate:
        """Return a method at all its steps, which costs no evaluation."""
        return Candidate(name=name, plan=Plan(method), extra={})

    def refinements(self, name: str, method: Method) -> Iterator[Candidate]:
        """Yield placements with one more full evaluation for each denoiser call of a sampler step."""
        calls = float(self._schedule.calls_per_step)
        units = sampler_steps(method.serves(self._schedule), self._schedule)
        return self._placed(name, method, units, {"full": calls})

    def lookaheads(self, method: Method) -> Iterator[Candidate]:
        """Yield placements with one more full evaluation of a sampler step for each cache interval."""
        calls = float(self._schedule.calls_per_step)
        units = intervals(method.serves(self._schedule), self._schedule)
        return self._placed("Lookahead", method, units, {"full": calls})

    def refreshes(self) -> Iterator[Candidate]:
        """Yield placements of cached sampler steps in full."""
        calls = float(self._schedule.calls_per_step)
        units = sampler_steps(Refresh().serves(self._schedule), self._schedule)
        return self._placed("Refresh", Refresh(), units, {"full": calls, "cached": -calls})

    def _placed(
        self, name: str, method: Method, units: Sequence[Unit], each: Evaluations
    ) -> Iterator[Candidate]:
        """Yield placements for all of the budget, and for a quarter of it; `each` is the price of a unit."""
        affordable = int(self._budget / overhead_of(each, self._schedule, self._costs) + _ROUNDING)
        most = min(affordable, len(units))
        for count in dict.fromkeys((most, most // _PART)):
            extra = {kind: number * count for kind, number in each.items()}
            for place, steps in placements(units, count).items():
                if count == most or place.startswith("ends"):
                    yield Candidate(name=f"{name} at {place}", plan=Plan(method, steps), extra=extra)


def sampler_steps(calls: Sequence[int], schedule: CacheSchedule) -> list[Unit]:
    """Return sorted denoiser calls as sampler steps."""
    return _grouped(calls, lambda call: call // schedule.calls_per_step)


def intervals(calls: Sequence[int], schedule: CacheSchedule) -> list[Unit]:
    """Return sorted cached denoiser calls, grouped by the full step whose feature they reuse."""
    full = [call for call in schedule.full_steps if call % schedule.calls_per_step == 0]
    return _grouped(calls, lambda call: sum(start <= call for start in full))


def placements(units: Sequence[Unit], affordable: int) -> dict[str, str]:
    """Return steps expressions by name, all different, each for as many units as are affordable."""
    if affordable >= len(units):
        return {"all": "all"} if units else {}
    if affordable < 1:
        return {}
    count, total = affordable, len(units)
    chosen = {
        f"first {count}": range(count),
        f"last {count}": range(total - count, total),
        f"ends {count}": [*range((count + 1) // 2), *range(total - count // 2, total)],
        f"spread {count}": [(2 * index + 1) * total // (2 * count) for index in range(count)],
    }
    named: dict[str, str] = {}
    for name, indices in chosen.items():
        expression = spelled(tuple(sorted(chain.from_iterable(units[index] for index in indices))))
        if expression not in named.values():
            named[name] = expression
    return named


def _grouped(calls: Sequence[int], group: Callable[[int], int]) -> list[Unit]:
    units: dict[int, list[int]] = {}
    for call in calls:
        units.setdefault(group(call), []).append(call)
    return [tuple(unit) for unit in units.values()]
