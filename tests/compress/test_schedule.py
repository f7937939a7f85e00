import pytest

from errata.compress import CacheSchedule
from errata.errors import RecipeError


def test_uniform_schedule() -> None:
    schedule = CacheSchedule.uniform(10, interval=4, branch=1)
    assert schedule.full_steps == (0, 4, 8)
    assert [schedule.kind(step) for step in range(5)] == ["full", "cached", "cached", "cached", "full"]


def test_interval_one_means_every_step_is_full() -> None:
    schedule = CacheSchedule.uniform(5, interval=1, branch=3)
    assert schedule.full_steps == CacheSchedule.uncached(5).full_steps


def test_json_round_trip() -> None:
    schedule = CacheSchedule.uniform(25, interval=10, branch=2)
    assert CacheSchedule.from_json(schedule.to_json()) == schedule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_steps": 0, "full_steps": (0,), "branch": 1}, "at least one step"),
        ({"num_steps": 3, "full_steps": (1, 2), "branch": 1}, "step 0 must be a full step"),
        ({"num_steps": 3, "full_steps": (0, 2, 2), "branch": 1}, "sorted, unique and below 3"),
        ({"num_steps": 3, "full_steps": (0, 3), "branch": 1}, "sorted, unique and below 3"),
        ({"num_steps": 3, "full_steps": (0,), "branch": 0}, "branch=0 cannot serve cached steps"),
    ],
)
def test_impossible_schedules_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        CacheSchedule(**values)  # type: ignore[arg-type]
