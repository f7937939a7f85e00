import json
from dataclasses import replace
from typing import Any

import pytest
from diffusers import DDIMScheduler

from errata.correct import IEC, DiffIER, FittedForecast, Forecast, Hindsight, Plan, Refresh
from errata.correct.plans import METHODS
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

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


def test_joined_plans_keep_their_order_and_their_steps() -> None:
    plan = Plan(Forecast(), "all") + (Plan(IEC(), "first:5") + Plan.none()) + Plan(DiffIER(), "8-9")
    assert plan.placed(CACHED) == ((Forecast(), (5, 6, 7, 9)), (IEC(), (0, 4)), (DiffIER(), (8, 9)))
    assert plan.resolve(CACHED) == (0, 4, 5, 6, 7, 8, 9)
    assert not plan.corrects_nothing
    assert (Plan.none() + Plan(IEC(), "none")).corrects_nothing


def test_a_joined_plan_is_for_the_artifact_that_a_part_was_made_for() -> None:
    bound, free = Plan(IEC(), "0", artifact=64 * "a"), Plan(Forecast())
    for plan in (bound + free, free + bound, bound + replace(free, artifact=64 * "a")):
        assert plan.artifact == 64 * "a"
        assert plan.also is not None
        assert plan.also.artifact is None
    with pytest.raises(PlanError, match="made for two artifacts, a{64} and b{64}; use plans"):
        bound + replace(free, artifact=64 * "b")


@pytest.mark.parametrize("expression", ["1-3", "first:3&last:3", "9", "none & all"])
def test_nothing_left(expression: str) -> None:
    message = f"steps '{expression}' leaves nothing to correct: IEC can correct steps 0,4,8 of this artifact"
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
    with pytest.raises(PlanError, match=r"is not a correction method; write for instance Plan"):
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


# Their numbers come from a fit. `test_sheet_file.py` has a plan with a sheet.
FROM_A_FIT = {"FittedForecast", "Sheet"}


@pytest.mark.parametrize(
    "plan",
    [
        Plan.none(),
        Plan(IEC(step_size=0.3, iterations=2), "first:3"),
        Plan(IEC.official("latent")),
        Plan(Forecast(), artifact=64 * "a") + Plan(IEC(), "full") + Plan(Refresh(), "1"),
        Plan(FittedForecast(weights=((), (), (), (1.5, -0.25)))) + Plan(Hindsight()),
        *(Plan(method()) for name, method in METHODS.items() if name not in FROM_A_FIT),
    ],
)
def test_json_round_trip(plan: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_golden_json() -> None:
    assert Plan(IEC(), "ends:1/10").to_json() == {
        "type": "Plan",
        "version": 2,
        "method": {
            "type": "IEC",
            "version": 2,
            "step_size": 0.5,
            "iterations": 1,
            "tolerance": 1e-05,
            "cache_after": "replace",
            "stopping": "per_sample",
            "guard": True,
        },
        "steps": "ends:1/10",
        "also": None,
        "artifact": None,
        "expected": None,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Recipe"}, "expected type 'Plan', got 'Recipe'"),
        ({"version": 1}, "Plan version 1 is not supported; this release reads version 2"),
        ({"budget": 0.1}, "Plan has an unknown key 'budget'; expected are method, steps, also"),
        (
            {"method": {"type": "os.system"}},
            "unknown correction method 'os.system'; known are .*, IEC, Langevin",
        ),
        ({"method": "IEC"}, "unknown correction method 'IEC'; known are .*, IEC, Langevin"),
        ({"method": {"type": ["IEC"]}}, "unknown correction method \\['IEC'\\]"),
        ({"method": {"type": "IEC", "version": 0}}, "IEC version 0 is not supported"),
        (
            {"method": {"type": "IEC", "version": 2}},
            "IEC has no key 'step_size'; expected are step_size, ",
        ),
        ({"method": {**IEC().to_json(), "damping": 1}}, "IEC has an unknown key 'damping'"),
        ({"method": {**IEC().to_json(), "step_size": 2.0}}, "IEC\\(step_size=2.0\\)"),
        ({"steps": 3}, "steps must be a string, got 3"),
        ({"also": {"type": "IEC"}}, "expected type 'Plan', got 'IEC'"),
        ({"artifact": 3}, "Plan.artifact is 3; it must be the digest of an artifact, or null"),
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
    with pytest.raises(PlanError, match="Plan has no key 'steps'"):
        Plan.from_json(value)


def test_the_calls_of_a_sampling_step_are_corrected_together() -> None:
    schedule = CacheSchedule.uniform(12, interval=3, branch=1, calls_per_step=2)
    assert Plan(Forecast(), "9").resolve(schedule) == (8, 9)
    assert Plan(Forecast(), "last:3").resolve(schedule) == (8, 9, 10, 11)


def test_a_plan_has_a_bounded_number_of_parts() -> None:
    plan = Plan(IEC())
    for _ in range(31):
        plan = plan + Plan(IEC())
    with pytest.raises(PlanError, match="a plan of 33 parts; at most 32"):
        plan + Plan(IEC())
    nested: dict[str, Any] | None = None
    for _ in range(5000):
        nested = {**Plan(IEC()).to_json(), "also": nested}
    assert nested is not None
    with pytest.raises(PlanError, match="more than 32 parts"):
        Plan.from_json(nested)


@pytest.mark.parametrize(("name", "value"), [("also", "x"), ("artifact", 3), ("expected", {})])
def test_what_a_plan_carries_has_its_type(name: str, value: Any) -> None:
    with pytest.raises(PlanError, match=name):
        Plan(IEC(), **{name: value})
