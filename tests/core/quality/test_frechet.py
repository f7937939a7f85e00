import math

import pytest
import torch
from torch import Tensor

from errata.quality import (
    FeatureStatistics,
    StatisticsAccumulator,
    bootstrap_interval,
    frechet_distance,
    paired_bootstrap,
    statistics,
)


def draw(count: int, dimension: int = 6, *, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.linspace(0.5, 2.0, dimension, dtype=torch.float64)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) * mix + shift


@pytest.mark.parametrize("count", [20, 400], ids=["rank deficient", "full rank"])
def test_a_set_has_no_distance_to_itself(count: int) -> None:
    own = statistics(100 * draw(count, 64))
    assert frechet_distance(own, own) <= 1e-6


def test_commuting_covariances_have_a_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 0.25, 0.0]).double()
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, -1.0, 2.0]).double()
    rotation = torch.linalg.qr(draw(3, 3)).Q
    left = FeatureStatistics(rotation @ mean_a, rotation @ torch.diag(a) @ rotation.T, 10)
    right = FeatureStatistics(rotation @ mean_b, rotation @ torch.diag(b) @ rotation.T, 10)
    expected = float((mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    # A zero variance is known to the root of the rounding error.
    assert frechet_distance(left, right) == pytest.approx(expected, rel=1e-7)


def test_two_dimensions_have_a_closed_form_without_a_matrix_root() -> None:
    # For 2x2 matrices, tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), with M = A B.
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double()
    b = torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    root_trace = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a @ b))))
    expected = 1.0 + float(a.trace() + b.trace()) - 2 * root_trace
    origin, moved = torch.zeros(2).double(), torch.tensor([0.6, 0.8], dtype=torch.float64)
    measured = frechet_distance(FeatureStatistics(origin, a, 9), FeatureStatistics(moved, b, 9))
    assert measured == pytest.approx(expected, rel=1e-10)


def test_streaming_equals_one_batch() -> None:
    features = draw(101, shift=1e4)  # a mean that a naive sum of squares would not survive
    accumulator = StatisticsAccumulator()
    for part in features.split([1, 40, 7, 53]):
        accumulator.add(part)
    streamed, whole = accumulator.statistics(), statistics(features)
    assert streamed.count == whole.count == 101
    torch.testing.assert_close(streamed.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(streamed.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.covariance, torch.cov(features.T), rtol=1e-9, atol=1e-9)


def test_bootstrap_interval_covers_the_expected_distance() -> None:
    reference = statistics(draw(4000, 3, seed=99))
    runs = [draw(60, 3, seed=seed, shift=0.4) for seed in range(60)]
    expected = sum(frechet_distance(statistics(run), reference) for run in runs) / len(runs)
    intervals = [bootstrap_interval(run, reference, resamples=100) for run in runs[:40]]
    covered = sum(interval.low <= expected <= interval.high for interval in intervals)
    assert 33 <= covered <= 40  # 38 of 40 expected at 95 %


def test_paired_interval_covers_the_change_and_is_narrower_than_an_unpaired_one() -> None:
    reference = statistics(draw(4000, 3, seed=99))

    def pair(seed: int) -> tuple[Tensor, Tensor]:
        shared = draw(60, 3, seed=seed, shift=0.4)
        return shared, shared + 0.15 + 0.1 * draw(60, 3, seed=1000 + seed)

    def change(a: Tensor, b: Tensor) -> float:
        return frechet_distance(statistics(b), reference) - frechet_distance(statistics(a), reference)

    pairs = [pair(seed) for seed in range(60)]
    expected = sum(change(a, b) for a, b in pairs) / len(pairs)
    intervals = [paired_bootstrap(a, b, reference, resamples=100) for a, b in pairs[:40]]
    assert 33 <= sum(interval.low <= expected <= interval.high for interval in intervals) <= 40
    other = draw(60, 3, seed=500, shift=0.55)
    unpaired = paired_bootstrap(pairs[0][0], other, reference, resamples=100)
    assert unpaired.high - unpaired.low > 1.5 * (intervals[0].high - intervals[0].low)


def test_no_change_has_no_interval() -> None:
    features = draw(40)
    interval = paired_bootstrap(features, features, statistics(draw(200, seed=1)), resamples=20)
    assert (interval.low, interval.high) == (0.0, 0.0)
    assert not interval.excludes_zero


def test_bootstrap_repeats_for_a_seed_and_leaves_the_threads_alone() -> None:
    features, reference = draw(40), statistics(draw(200, seed=1))
    threads = torch.get_num_threads()
    first = bootstrap_interval(features, reference, resamples=20, seed=3)
    assert first == bootstrap_interval(features, reference, resamples=20, seed=3)
    assert first != bootstrap_interval(features, reference, resamples=20, seed=4)
    assert torch.get_num_threads() == threads


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="features have 6 dimensions, the reference has 5"):
        frechet_distance(statistics(draw(20, 6)), statistics(draw(20, 5)))
    with pytest.raises(ValueError, match=r"paired features have shapes \(20, 6\) and \(19, 6\)"):
        paired_bootstrap(draw(20), draw(19), statistics(draw(20)))
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        statistics(draw(1))
    with pytest.raises(ValueError, match=r"expected \(samples, dimensions\)"):
        statistics(torch.zeros(3))
    with pytest.raises(ValueError, match="resamples=1"):
        bootstrap_interval(draw(20), statistics(draw(20)), resamples=1)
    accumulator = StatisticsAccumulator()
    accumulator.add(draw(4, 6))
    with pytest.raises(ValueError, match="features have 5 dimensions, earlier ones 6"):
        accumulator.add(draw(4, 5))
