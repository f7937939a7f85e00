import itertools

import pytest

from errata.compress import CacheSchedule
from errata.errors import RecipeError
from errata.runtime.schedule import power_law_steps


def test_uniform_schedule() -> None:
    schedule = CacheSchedule.uniform(10, interval=4, branch=1)
    assert schedule.full_steps == (0, 4, 8)
    assert [schedule.kind(step) for step in range(5)] == ["full", "cached", "cached", "cached", "full"]


def test_interval_one_means_every_step_is_full() -> None:
    schedule = CacheSchedule.uniform(5, interval=1, branch=3)
    assert schedule.full_steps == CacheSchedule.uncached(5).full_steps


def test_an_interval_beyond_the_run_leaves_one_full_step() -> None:
    assert CacheSchedule.uniform(5, interval=9, branch=1).full_steps == (0,)


def test_groups_are_a_full_step_and_the_cached_ones_after_it() -> None:
    schedule = CacheSchedule(num_steps=10, full_steps=(0, 1, 6), branch=1)
    assert schedule.groups == ((0, 1), (1, 6), (6, 10))
    assert CacheSchedule.uncached(3).groups == ((0, 1), (1, 2), (2, 3))


def test_json_round_trip() -> None:
    schedule = CacheSchedule.uniform(25, interval=10, branch=2)
    assert CacheSchedule.from_json(schedule.to_json()) == schedule


def test_the_calls_of_a_sampler_step_are_full_together() -> None:
    schedule = CacheSchedule.uniform(14, interval=3, branch=1, calls_per_step=2)
    assert schedule.full_steps == (0, 1, 6, 7, 12, 13)
    assert schedule.groups == ((0, 6), (6, 12), (12, 14))
    assert [schedule.stream(step) for step in range(4)] == [0, 1, 0, 1]
    neighbours = CacheSchedule(num_steps=9, full_steps=(0, 1, 2, 3, 4, 5), branch=1, calls_per_step=3)
    assert neighbours.groups == ((0, 3), (3, 9))
    assert CacheSchedule.uncached(4, calls_per_step=2).groups == ((0, 2), (2, 4))
    assert [CacheSchedule.uncached(4).stream(step) for step in range(4)] == [0, 0, 0, 0]


def test_several_calls_are_written_down_and_a_single_one_is_not() -> None:
    two = CacheSchedule.uniform(12, interval=2, branch=1, calls_per_step=2)
    assert two.to_json()["calls_per_step"] == 2
    assert CacheSchedule.from_json(two.to_json()) == two
    one = CacheSchedule.uniform(12, interval=2, branch=1)
    assert one.to_json() == {"num_steps": 12, "full_steps": [0, 2, 4, 6, 8, 10], "branch": 1}
    assert one == CacheSchedule.from_json(one.to_json()) != two


def test_a_power_law_is_dense_around_its_centre() -> None:
    steps = power_law_steps(100, count=20, center=50, power=1.4)
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert len(steps) == 20
    assert max(gaps[9:11]) <= 3 < 6 <= min(gaps[0], gaps[-1])
    mirrored = [100 - step for step in steps[1:]]
    assert all(abs(a - b) <= 1 for a, b in zip(sorted(mirrored), steps[1:], strict=True))


@pytest.mark.parametrize(
    ("center", "dense", "sparse"), [(0, slice(0, 3), slice(-3, None)), (60, slice(-3, None), slice(0, 3))]
)
def test_a_power_law_around_an_end_of_the_run(center: float, dense: slice, sparse: slice) -> None:
    gaps = [b - a for a, b in itertools.pairwise(power_law_steps(60, count=12, center=center, power=1.4))]
    assert max(gaps[dense]) < min(gaps[sparse])


@pytest.mark.parametrize("power", [1.05, 1.4, 3, 10])
def test_a_power_law_always_has_as_many_steps_as_asked_and_they_lie_in_the_run(power: float) -> None:
    for num_steps in (1, 2, 3, 7, 20):
        for count in range(1, num_steps + 1):
            for center in (0, 0.3, num_steps / 2, num_steps - 1, num_steps):
                steps = power_law_steps(num_steps, count=count, center=center, power=power)
                assert len(set(steps)) == count
                assert list(steps) == sorted(steps)
                assert steps[0] == 0
                assert steps[-1] < num_steps


def test_a_power_law_with_every_step_is_every_step() -> None:
    assert power_law_steps(12, count=12, center=6, power=1.4) == tuple(range(12))


@pytest.mark.parametrize("center", [-0.1, 10.5])
def test_a_centre_beyond_the_run_is_refused(center: float) -> None:
    with pytest.raises(RecipeError, match=f"center={center:g} is beyond the run; allowed are 0 to 10"):
        power_law_steps(10, count=3, center=center, power=1.4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_steps": 0, "full_steps": (0,), "branch": 1}, "at least one step"),
        ({"num_steps": 3, "full_steps": (), "branch": 1}, "step 0 must be a full step"),
        ({"num_steps": 3, "full_steps": (1, 2), "branch": 1}, "step 0 must be a full step"),
        ({"num_steps": 3, "full_steps": (0, 2, 2), "branch": 1}, "sorted, unique and below 3"),
        ({"num_steps": 3, "full_steps": (0, 3), "branch": 1}, "sorted, unique and below 3"),
        ({"num_steps": 3, "full_steps": (0,), "branch": 0}, "branch=0 cannot serve cached steps"),
        (
            {"num_steps": 4, "full_steps": (0, 2), "branch": 1, "calls_per_step": 2},
            "leaves out call 1, but the 2 calls of a sampler step are full together",
        ),
        (
            {"num_steps": 6, "full_steps": (0, 1, 3), "branch": 1, "calls_per_step": 2},
            "leaves out call 2, but the 2 calls of a sampler step",
        ),
        (
            {"num_steps": 5, "full_steps": (0, 1), "branch": 1, "calls_per_step": 2},
            "5 denoiser calls do not make whole sampler steps with calls_per_step=2",
        ),
        ({"num_steps": 2, "full_steps": (0,), "branch": 1, "calls_per_step": 0}, "calls_per_step=0; allowed"),
        ({"num_steps": 2, "full_steps": (0,), "branch": 1, "calls_per_step": "2"}, "calls_per_step='2'"),
    ],
)
def test_impossible_schedules_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        CacheSchedule(**values)  # type: ignore[arg-type]
