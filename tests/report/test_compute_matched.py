"""Compute-matched alternatives cost what the correction costs."""

import pytest

from errata.correct import IEC, Forecast, Hindsight, Plan, Refresh, SecondOrder
from errata.correct.costs import Costs, plain_evaluations, price
from errata.deploy import DeployedPipeline
from errata.errors import ArtifactMismatchError
from errata.report import Reference, run
from errata.report.compute_matched import (
    TOLERANCE,
    _more_full_steps,
    _spread,
    alternatives_of,
    float_steps,
)
from errata.runtime.schedule import CacheSchedule

COSTS: Costs = {"full": 1.0, "cached": 0.25}


def uniform(steps: int, interval: int) -> CacheSchedule:
    return CacheSchedule(
        num_steps=steps, full_steps=tuple(range(0, steps, interval)), branch=1, calls_per_step=1
    )


def test_full_steps_are_spread_into_the_longest_intervals() -> None:
    assert _spread(uniform(20, 10), 1) == [5]
    assert _spread(uniform(20, 10), 2) == [5, 15]
    assert _spread(uniform(20, 10), 3) == [2, 5, 15] or _spread(uniform(20, 10), 3) == [5, 7, 15]
    assert _spread(uniform(4, 2), 9) == [1, 3]
    assert _spread(uniform(4, 2), 0) == []


@pytest.mark.parametrize("extra", [1.0, 3.0, 7.0])
def test_more_full_steps_cost_what_the_correction_costs(extra: float) -> None:
    schedule = uniform(40, 5)
    base = price(plain_evaluations(schedule), COSTS)
    each = _more_full_steps(schedule, extra, base, COSTS)
    assert each is not None
    count = len(each.plan.resolve(schedule))
    assert isinstance(each.plan.method, Refresh)
    assert each.seconds == pytest.approx(base + count * 0.75)
    assert base + extra - 0.75 < each.seconds <= base + extra


def test_alternatives_of_a_cached_artifact(deployed: DeployedPipeline) -> None:
    base = price(plain_evaluations(deployed.schedule), COSTS)
    plan = Plan(IEC(), "all")
    found = {each.name: each for each in alternatives_of(deployed, plan, {"full": 2.0}, COSTS)}
    assert list(found) == ["forecast+hindsight", "12 steps", "+2 full", "second-order at all"]
    assert found["forecast+hindsight"].plan == Plan(Forecast(order=1)) + Plan(Hindsight())
    assert found["forecast+hindsight"].seconds == base
    assert found["12 steps"].steps == 12
    assert found["12 steps"].seconds == pytest.approx(base + 2.0)
    at_twelve = price(plain_evaluations(deployed.at_steps(12).schedule), COSTS)
    assert at_twelve == pytest.approx(base + 2.0)
    assert found["second-order at all"].plan == Plan(SecondOrder(), "all")


def test_what_the_artifact_cannot_serve_is_reported(
    deployed: DeployedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: DeployedPipeline, steps: int) -> None:
        raise ArtifactMismatchError(f"no timesteps are known for {steps}")

    monkeypatch.setattr(DeployedPipeline, "at_steps", refuse)
    told: list[str] = []
    found = alternatives_of(deployed, Plan(IEC(), "all"), {"full": 2.0}, COSTS, refused=told.append)
    assert [each.name for each in found] == ["forecast+hindsight", "+2 full", "second-order at all"]
    assert told == ["no correction, 12 steps: no timesteps are known for 12"]


def test_a_free_plan_has_free_alternatives_only(deployed: DeployedPipeline) -> None:
    free = Plan(Forecast(order=1)) + Plan(Hindsight())
    assert alternatives_of(deployed, free, {}, COSTS) == []
    assert [each.name for each in alternatives_of(deployed, Plan(Hindsight()), {}, COSTS)] == [
        "forecast+hindsight"
    ]


def test_a_plan_is_not_its_own_alternative(deployed: DeployedPipeline) -> None:
    names = [
        each.name for each in alternatives_of(deployed, Plan(SecondOrder(), "all"), {"full": 2.0}, COSTS)
    ]
    assert "second-order at all" not in names


def test_float_steps() -> None:
    assert float_steps(7.4, 1.0, most=24) == 7
    assert float_steps(7.97, 1.0, most=24) == 8
    assert float_steps(0.4, 1.0, most=24) is None
    assert float_steps(30.0, 1.0, most=24) is None


def test_a_report_measures_them_and_compares(
    deployed: DeployedPipeline, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("alternatives") / "out"
    plans = {"all": Plan(IEC(), "all")}
    report = run({"mine": deployed}, plans, reference, out, samples=8, batch_size=4, resamples=20)
    plain, corrected, *added = report.rows
    assert {row.role for row in added} == {"equal compute"}
    assert {"forecast+hindsight", "second-order at all"} < {row.plan for row in added}
    assert corrected.verdict.kind in ("pays", "does not pay", "not distinguishable")
    by_plan = {row.plan: row for row in report.rows}
    assert {each.plan for each in corrected.alternatives} >= {"none", "forecast+hindsight"}
    for each in corrected.alternatives:
        assert each.compute <= TOLERANCE
        assert each.compute == pytest.approx(by_plan[each.plan].compute / corrected.compute)
        difference = corrected.frechet.value - by_plan[each.plan].frechet.value
        assert each.difference.value == pytest.approx(difference)
    assert plain.alternatives == ()
    assert all(row.front in ("on", "near", "off") for row in report.rows)
    assert sum(row.front == "on" for row in report.rows) >= 1
