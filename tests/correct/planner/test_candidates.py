import dataclasses

import pytest

from errata.correct import IEC
from errata.correct.costs import Costs, overhead_of, plain_evaluations
from errata.correct.planner.candidates import Candidate, cache_free_plan, candidates_for
from errata.correct.plans import Plan
from errata.correct.sampling import PlanSampler, default_inputs
from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule

COSTS: Costs = {"full": 1.0, "cached": 0.25}
CACHED = CacheSchedule.uniform(12, interval=3, branch=1)
BUDGETS = [0.0, 0.15, 0.3, 1.0, 5.0]


def names(schedule: CacheSchedule, budget: float) -> list[str]:
    return [candidate.name for candidate in candidates_for(schedule, COSTS, budget)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("schedule", [CACHED, CacheSchedule.uncached(12)])
def test_all_are_within_the_budget(schedule: CacheSchedule, budget: float) -> None:
    found = candidates_for(schedule, COSTS, budget)
    assert [each.name for each in found if overhead_of(each.extra, schedule, COSTS) > budget + 1e-9] == []


def test_names_and_plans_are_told_apart() -> None:
    for schedule in (CACHED, CacheSchedule.uncached(12)):
        for budget in BUDGETS:
            found = candidates_for(schedule, COSTS, budget)
            assert len({each.name for each in found}) == len(found)
            assert len({each.plan for each in found}) == len(found)


def test_the_budget_is_used_up() -> None:
    # a plain run costs 4 full and 8 cached calls, 6 in all: 0.4 of it buys 2 full calls, or 3 refreshed ones
    assert {"IEC at ends 2", "Lookahead at first 2", "Refresh at spread 3"} <= {*names(CACHED, 0.4)}
    assert "IEC at ends 2" not in names(CACHED, 0.3)
    assert {"IEC at all", "Refresh at all"} <= {*names(CACHED, 1.0)}
    assert "IEC at ends 2 + Forecast 1 + Hindsight" in names(CACHED, 0.4)


def test_without_a_budget_only_what_is_free_is_left() -> None:
    assert {each.name: dict(each.extra) for each in candidates_for(CACHED, COSTS, 0.0) if each.extra} == {}
    assert "Forecast 1" in names(CACHED, 0.0)
    assert not any("Forecast" in name or "Refresh" in name for name in names(CacheSchedule.uncached(12), 0.5))


@pytest.mark.parametrize("artifact", ["deployed", "uncached"])
@pytest.mark.parametrize("budget", [0.2, 0.45, 5.0])
def test_predicted_evaluations_are_those_that_are_made(
    artifact: str, budget: float, request: pytest.FixtureRequest
) -> None:
    deployed: DeployedPipeline = request.getfixturevalue(artifact)
    plain = plain_evaluations(deployed.schedule)
    for candidate in candidates_for(deployed.schedule, COSTS, budget):
        sampler = PlanSampler(deployed, candidate.plan, seed=0, inputs=default_inputs)
        made = sampler.sample(range(2))
        for kind in plain:
            extra = made.base.get(kind, 0.0) + made.extra.get(kind, 0.0) - plain[kind]
            assert extra == pytest.approx(candidate.extra.get(kind, 0.0), abs=1e-12), candidate.name


def test_where_a_step_takes_two_calls_everything_costs_twice() -> None:
    schedule = CacheSchedule.uniform(24, interval=3, branch=1, calls_per_step=2)
    extra = {each.name: dict(each.extra) for each in candidates_for(schedule, COSTS, 0.4)}
    assert extra["IEC at first 2"] == {"full": 4.0}
    assert extra["Lookahead at first 2"] == {"full": 4.0}
    assert extra["Refresh at first 3"] == {"full": 6.0, "cached": -6.0}


def test_candidates_add_up() -> None:
    one = Candidate(name="one", plan=Plan(IEC(), "0"), extra={"full": 1.0})
    two = Candidate(name="two", plan=cache_free_plan(), extra={"full": 8.0, "cached": -8.0})
    assert (one + two).extra == {"full": 9.0, "cached": -8.0}
    assert (one + two).plan == dataclasses.replace(one.plan, also=two.plan)
    assert (one + two).name == "one + two"
