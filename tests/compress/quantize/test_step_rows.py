import pytest

from errata.compress.quantize.step_rows import StepRows


@pytest.mark.parametrize("steps", [1, 6, 25, 49])
def test_of_few_steps_each_runs_every_trajectory(steps: int) -> None:
    rows = StepRows(samples=64, num_steps=steps)
    assert all(rows.samples_at(step) == range(64) for step in range(steps))


@pytest.mark.parametrize(
    ("steps", "samples", "groups"), [(50, 64, 2), (100, 64, 4), (1000, 64, 4), (1000, 512, 32), (100, 37, 2)]
)
def test_of_many_steps_neighbours_run_different_groups(steps: int, samples: int, groups: int) -> None:
    rows = StepRows(samples=samples, num_steps=steps)
    assert rows.groups == groups
    for step in range(steps - groups):
        near = [sample for other in range(step, step + groups) for sample in rows.samples_at(other)]
        assert sorted(near) == list(range(samples))
        assert 16 <= len(rows.samples_at(step)) <= samples // groups + 1


@pytest.mark.parametrize("samples", [1, 15, 31])
def test_few_trajectories_are_not_split(samples: int) -> None:
    rows = StepRows(samples=samples, num_steps=1000)
    assert all(rows.samples_at(step) == range(samples) for step in range(1000))


def test_the_calls_of_a_sampler_step_run_the_same_group() -> None:
    rows = StepRows(samples=64, num_steps=200, calls_per_step=2)
    assert rows.groups == 4
    assert rows.samples_at(6) == rows.samples_at(7) == range(48, 64)
    assert rows.samples_at(8) == range(16)
