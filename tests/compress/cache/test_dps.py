import itertools
import math
from collections import deque
from collections.abc import Iterator
from math import ceil

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from errata.calibration import CalibrationSet
from errata.compress import CacheQuant, CacheSchedule
from errata.compress.cache import cache_features
from errata.compress.cache.cache_features import add_distances, feature_distances
from errata.compress.cache.dps import cost_of, search, search_schedule
from errata.runtime.schedule import uniform_steps
from errata.runtime.unet import BranchedUNet


def random_distances(num_steps: int, interval: int, seed: int) -> Tensor:
    """Distances of random features, whose step sizes vary along the run."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(num_steps, 6, generator=generator, dtype=torch.float64) ** 4
    features = (steps * torch.randn(num_steps, 6, generator=generator, dtype=torch.float64)).cumsum(0)
    distances = torch.zeros(num_steps, 2 * interval, dtype=torch.float64)
    latest: deque[Tensor] = deque(maxlen=2 * interval - 1)
    for step in range(num_steps):
        add_distances(distances, features[step][None], latest, step=step)
    return distances


def partitions(num_steps: int, count: int, low: int, high: int) -> Iterator[tuple[int, ...]]:
    """Starts of every cut into `count` groups of `low` to `high` steps."""
    for inner in itertools.combinations(range(1, num_steps), count - 1):
        bounds = (0, *inner, num_steps)
        if all(low <= b - a <= high for a, b in itertools.pairwise(bounds)):
            yield bounds[:-1]


@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8, 11, 13])
def test_the_search_finds_the_best_of_all_partitions(num_steps: int, interval: int) -> None:
    count, low, high = ceil(num_steps / interval), ceil(interval / 2), 2 * interval
    candidates = list(partitions(num_steps, count, low, high)) or [(0,)]
    uniform = uniform_steps(num_steps, interval=interval)
    for seed in range(8):
        distances = random_distances(num_steps, interval, seed)
        found = search(distances, interval)
        costs = [cost_of(distances, candidate) for candidate in candidates]
        assert cost_of(distances, found) == pytest.approx(min(*costs, cost_of(distances, uniform)), abs=1e-12)
        assert found in candidates or found == uniform
        assert len(found) == count


@pytest.mark.parametrize(("num_steps", "interval"), [(100, 5), (100, 10), (250, 7), (50, 20), (97, 3)])
def test_it_never_costs_more_than_uniform_and_the_recipe_allows_it(num_steps: int, interval: int) -> None:
    distances = random_distances(num_steps, interval, seed=5)
    found, uniform = search(distances, interval), uniform_steps(num_steps, interval=interval)
    assert cost_of(distances, found) < cost_of(distances, uniform)
    schedule = CacheSchedule(num_steps=num_steps, full_steps=found, branch=1)
    assert CacheQuant(interval=interval).allows(schedule)


def test_uniform_steps_win_where_only_their_short_last_group_fits() -> None:
    features = torch.tensor([0.0] * 4 + [1.0] * 4 + [5.0])  # nine steps, the last unlike all others
    distances = torch.zeros(9, 8)
    for start, back in itertools.product(range(9), range(8)):
        if start + back < 9:
            distances[start, back] = (features[start + back] - features[start]).abs()
    assert search(distances, 4) == (0, 4, 8)
    assert cost_of(distances, (0, 4, 8)) == 0 < cost_of(distances, (0, 4, 7))


def test_a_run_shorter_than_a_group_is_one_group() -> None:
    assert search(torch.zeros(2, 10), 5) == (0,)
    assert search(torch.zeros(2, 2), 5) == (0,)


def test_entries_beyond_the_run_are_not_read() -> None:
    distances = random_distances(11, 3, seed=1)
    poisoned = distances.clone()
    for start, back in itertools.product(range(11), range(6)):
        if start + back >= 11:
            poisoned[start, back] = math.nan
    assert search(poisoned, 3) == search(distances, 3)


def test_too_few_distances_are_refused() -> None:
    with pytest.raises(ValueError, match=r"distances are \[9, 5\]; needed are 6 columns or more"):
        search(torch.zeros(9, 5), 3)


@torch.no_grad()
def slow_distances(pipeline: DDIMPipeline, calibration_set: CalibrationSet, branch: int) -> Tensor:
    """Every pair of steps, all features in memory, in float64."""
    model = BranchedUNet(pipeline.unet)
    features = []
    for step, time in enumerate(calibration_set.timesteps):
        records = calibration_set.batches(step)
        kept = [model.full(record.sample, float(time), {}, branch=branch)[1] for record in records]
        features.append(torch.cat([feature for feature in kept if feature is not None]).double())
    stacked = torch.stack(features)
    return (stacked[:, None] - stacked[None]).abs().flatten(2).sum(-1)


@pytest.mark.parametrize(("branch", "samples_at_a_time"), [(1, 32), (3, 3), (2, 1)])
def test_feature_distances_are_those_of_the_float_model(
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
    branch: int,
    samples_at_a_time: int,
) -> None:
    monkeypatch.setattr(cache_features, "_LARGEST_CHUNK", samples_at_a_time)
    found = feature_distances(tiny_pipeline.unet, tiny_calibration, branch=branch, interval=2)
    pairs = slow_distances(tiny_pipeline, tiny_calibration, branch)
    expected = torch.zeros(6, 4, dtype=torch.float64)
    for start, back in itertools.product(range(6), range(4)):
        if start + back < 6:
            expected[start, back] = pairs[start, start + back]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_fewer_samples_use_the_first_ones(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet
) -> None:
    few, all_of_them = (
        feature_distances(tiny_pipeline.unet, tiny_calibration, branch=1, interval=3, samples=samples)
        for samples in (3, 8)
    )
    assert (few[:5, 1:2] < all_of_them[:5, 1:2]).all()
    assert (few[:5, 1:2] > 0).all()


def test_at_most_the_features_of_two_intervals_are_kept(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    original = cache_features.add_distances

    def watched(distances: Tensor, feature: Tensor, latest: deque[Tensor], *, step: int) -> None:
        original(distances, feature, latest, step=step)
        kept.append(len(latest))

    monkeypatch.setattr(cache_features, "add_distances", watched)
    feature_distances(tiny_pipeline.unet, tiny_calibration, branch=1, interval=2)
    assert max(kept) == 3


def test_the_schedule_of_a_recipe(tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet) -> None:
    unet = tiny_pipeline.unet
    cache = CacheQuant(interval=2)
    found = search_schedule(unet, tiny_calibration, cache, 3)
    distances = feature_distances(unet, tiny_calibration, branch=3, interval=2)
    assert found == CacheSchedule(num_steps=6, full_steps=search(distances, 2), branch=3)
    assert cache.allows(found)
    uniform = search_schedule(unet, tiny_calibration, CacheQuant(interval=4, search="uniform"), 1)
    assert uniform.full_steps == (0, 4)


@pytest.mark.parametrize(("interval", "full_steps"), [(1, (0, 1, 2, 3, 4, 5)), (6, (0,)), (100, (0,))])
def test_without_a_choice_nothing_is_evaluated(
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
    interval: int,
    full_steps: tuple[int, ...],
) -> None:
    monkeypatch.setattr("errata.compress.cache.dps.feature_distances", None)
    found = search_schedule(tiny_pipeline.unet, tiny_calibration, CacheQuant(interval=interval), 1)
    assert found.full_steps == full_steps
