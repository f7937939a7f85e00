import pytest

from errata.correct.planner.candidates import intervals, placements, sampler_steps
from errata.correct.steps import select
from errata.runtime.schedule import CacheSchedule

UNITS = [(step,) for step in range(20)]


def test_what_fits_entirely_goes_everywhere() -> None:
    assert placements(UNITS, 20) == {"all": "all"}
    assert placements(UNITS, 99) == {"all": "all"}


def test_nothing_fits_or_nothing_is_there() -> None:
    assert placements(UNITS, 0) == {}
    assert placements([], 5) == {}


def test_places_fill_the_budget() -> None:
    assert placements(UNITS, 5) == {
        "first 5": "0-4",
        "last 5": "15-19",
        "ends 5": "0-2,18-19",
        "spread 5": "2,6,10,14,18",
    }


@pytest.mark.parametrize("affordable", range(1, 20))
def test_every_place_has_exactly_what_is_affordable(affordable: int) -> None:
    schedule = CacheSchedule.uncached(20)
    found = placements(UNITS, affordable)
    assert {len(select(steps, schedule)) for steps in found.values()} == {affordable}
    assert len(set(found.values())) == len(found)


def test_units_of_two_calls_stay_whole() -> None:
    schedule = CacheSchedule.uniform(24, interval=3, branch=1, calls_per_step=2)
    steps = sampler_steps(schedule.full_steps, schedule)
    assert steps == [(0, 1), (6, 7), (12, 13), (18, 19)]
    cached = [call for call in range(24) if call not in schedule.full_steps]
    assert intervals(cached, schedule) == [
        (2, 3, 4, 5),
        (8, 9, 10, 11),
        (14, 15, 16, 17),
        (20, 21, 22, 23),
    ]
    assert placements(steps, 1)["last 1"] == "18-19"
