import json
from typing import Any

import pytest
from diffusers import DDIMScheduler

from errata.compress.recipes.schedule import CacheSchedule
from errata.correct import IEC, Plan
from errata.errors import PlanError

UNCACHED = CacheSchedule.uncached(10)
CACHED = CacheSchedule.uniform(10, interval=4, branch=1)


def test_iec_serves_the_full_steps() -> None:
    assert Plan(IEC()).resolve(UNCACHED) == tuple(range(10))
    assert Plan(IEC()).resolve(CACHED) == (0, 4, 8)
    assert Plan(IEC(), "ends:1/5").resolve(CACHED) == (0, 8)
    assert Plan(IEC(), "ends:1/5").resolve(UNCACHED) == (0, 1, 8, 9)


@pytest.mark.parametrize("plan", [Plan.none(), Plan(IEC(), "none"), Plan(None, "none")])
def test_none_selects_nothing(plan: Plan) -> None:
    assert plan.resolve(CACHED) == ()


@pytest.mark.parametrize("expression", ["1-3", "first:3&last:3", "9", "none & all"])
def test_nothing_left(expression: str) -> None:
    message = (
        f"steps '{expression}' leaves nothing to correct: IEC serves steps 0,4,8 of this artifact; name "
    )
    with pytest.raises(PlanError, match=message):
        Plan(IEC(), expression).resolve(CACHED)


def test_beyond_the_schedule() -> None:
    with pytest.raises(PlanError, match="'7-10' reaches step 10"):
        Plan(IEC(), "7-10").resolve(UNCACHED)


def test_malformed_steps_are_refused_at_once() -> None:
    with pytest.raises(PlanError, match="steps 'ends:10%': 'ends:10%' is not a selection of steps"):
        Plan(IEC(), "ends:10%")


@pytest.mark.parametrize("method", ["iec", IEC, 3])
def test_no_method(method: Any) -> None:
    with pytest.raises(PlanError, match="is no correction method; write Plan\\(IEC\\(\\)\\) for instance"):
        Plan(method)


def test_steps_without_a_method() -> None:
    with pytest.raises(PlanError, match="steps 'all' without a method; write Plan\\(IEC\\(\\), steps=…\\)"):
        Plan(None)


def test_paper(deploy_closed_form: Any) -> None:
    def paper(schedule: CacheSchedule) -> Plan:
        scheduler = DDIMScheduler(clip_sample=False)
        return Plan.paper(deploy_closed_form(lambda x, step: x, scheduler, 10, schedule=schedule))

    assert paper(UNCACHED) == Plan(IEC(step_size=0.5, iterations=1, tolerance=1e-5), "all")
    assert paper(CACHED) == Plan(IEC(), "full")


@pytest.mark.parametrize(
    "plan", [Plan.none(), Plan(IEC()), Plan(IEC(step_size=0.3, iterations=2), "first:3")]
)
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_golden_json() -> None:
    assert Plan(IEC(), "ends:1/10").to_json() == {
        "type": "Plan",
        "version": 1,
        "method": {
            "type": "IEC",
            "version": 1,
            "step_size": 0.5,
            "iterations": 1,
            "tolerance": 1e-05,
            "cache_after": "replace",
        },
        "steps": "ends:1/10",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Recipe"}, "expected type 'Plan', got 'Recipe'"),
        ({"version": 2}, "Plan version 2 is not one that this release reads; it reads 1"),
        ({"budget": 0.1}, "Plan has an unknown key 'budget'; expected are method, steps"),
        ({"method": {"type": "os.system"}}, "unknown correction method 'os.system'; known are IEC"),
        ({"method": "IEC"}, "unknown correction method 'IEC'; known are IEC"),
        ({"method": {"type": ["IEC"]}}, "unknown correction method \\['IEC'\\]"),
        ({"method": {"type": "IEC", "version": 0}}, "IEC version 0 is not one"),
        (
            {"method": {"type": "IEC", "version": 1}},
            "IEC lacks the key 'step_size'; expected are step_size, ",
        ),
        ({"method": {**IEC().to_json(), "damping": 1}}, "IEC has an unknown key 'damping'"),
        ({"method": {**IEC().to_json(), "step_size": 2.0}}, "IEC\\(step_size=2.0\\)"),
        ({"steps": 3}, "steps must be a string, got 3"),
    ],
)
def test_json_is_read_strictly(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_json({**Plan(IEC()).to_json(), **change})


def test_not_an_object() -> None:
    with pytest.raises(PlanError, match="expected a Plan as a JSON object, got \\['IEC'\\]"):
        Plan.from_json(["IEC"])  # type: ignore[arg-type]


def test_a_missing_key() -> None:
    value = Plan(IEC()).to_json()
    del value["steps"]
    with pytest.raises(PlanError, match="Plan lacks the key 'steps'"):
        Plan.from_json(value)
