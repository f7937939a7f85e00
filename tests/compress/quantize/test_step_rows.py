import pytest

from errata.compress.quantize.observation import StepRows


@pytest.mark.parametrize("steps", [1, 6, 25, 49])
def test_few_steps_run_every_trajectory_and_stand_alone(steps: int) -> None:
    rows = StepRows(samples=64, num_steps=steps)
    for step in range(steps):
        assert rows.samples_at(step) == range(64)
        assert rows.around(step) == (step,)


@pytest.mark.parametrize(("steps", "samples"), [(50, 64), (100, 64), (100, 10), (1000, 64), (1000, 7)])
def test_a_range_sees_every_trajectory_and_the_work_is_bounded(steps: int, samples: int) -> None:
    rows = StepRows(samples=samples, num_steps=steps)
    reach, last = rows.groups // 2, -(-7 * steps // 8)
    assert 2 * reach + 1 <= steps / 25 + 1
    for step in range(reach, last - reach):
        near = rows.around(step)
        assert near == tuple(range(step - reach, step + reach + 1))
        assert {sample for other in near for sample in rows.samples_at(other)} == set(range(samples))
    work = sum(len(rows.samples_at(step)) for step in range(last))
    assert work <= max(50 * samples, steps)


def test_the_last_eighth_runs_every_trajectory_and_stands_alone() -> None:
    rows = StepRows(samples=64, num_steps=100)
    assert rows.around(0) == (0, 1, 2)
    assert rows.around(87) == (85, 86, 87)
    assert len({sample for step in rows.around(87) for sample in rows.samples_at(step)}) == 48
    for step in range(88, 100):
        assert rows.around(step) == (step,)
        assert rows.samples_at(step) == range(64)
    assert sum(len(rows.samples_at(step)) for step in range(100)) == 88 * 16 + 12 * 64


def test_calls_of_different_kinds_are_not_mixed() -> None:
    rows = StepRows(samples=8, num_steps=200, calls_per_step=2)
    assert rows.groups == 4
    assert rows.around(7) == (3, 5, 7, 9, 11)
    assert rows.samples_at(6) == rows.samples_at(7)


def test_one_trajectory_is_run_at_every_step() -> None:
    rows = StepRows(samples=1, num_steps=100)
    assert all(rows.samples_at(step) == range(1) for step in range(100))
