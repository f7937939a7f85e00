from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from errata.quality import frechet
from errata.quality.frechet import frechet_distance, resampled_distances, statistics
from errata.quality.resampling import WeightedAccumulator, resample_counts


def draw(count: int, dimension: int = 4, *, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64) + shift


def counting(features: Tensor, sizes: list[int], calls: list[int]) -> Callable[[], Iterable[Tensor]]:
    def chunks() -> Iterable[Tensor]:
        calls.append(1)
        return features.split(sizes)

    return chunks


def test_counts_depend_on_nothing_but_count_and_seed() -> None:
    (whole,) = resample_counts(9, 5, seed=1)
    assert whole.sum(dim=1).tolist() == [9.0] * 5
    parts = list(resample_counts(9, 5, seed=1, group=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(next(resample_counts(9, 3, seed=1)), whole[:3])
    assert not torch.equal(next(resample_counts(9, 5, seed=2)), whole)


def test_weights_are_repetitions_even_far_from_the_origin() -> None:
    features, (counts,) = draw(50, shift=1e4), resample_counts(50, 3, seed=0)
    accumulator = WeightedAccumulator(counts)
    for part in features.split([1, 30, 19]):
        accumulator.add(part)
    means, covariances = accumulator.means_and_covariances()
    for row, mean, covariance in zip(counts, means, covariances, strict=True):
        expected = statistics(features.repeat_interleave(row.long(), dim=0))
        torch.testing.assert_close(mean, expected.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(covariance, expected.covariance, rtol=1e-9, atol=1e-9)


def test_distances_are_those_of_a_direct_loop_however_they_are_streamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, reference = draw(60, shift=0.3), statistics(draw(500, seed=1))
    (counts,) = resample_counts(60, 7, seed=5)
    direct = [
        frechet_distance(statistics(features.repeat_interleave(row.long(), dim=0)), reference)
        for row in counts
    ]
    calls: list[int] = []
    whole = resampled_distances(counting(features, [60], calls), 60, reference, resamples=7, seed=5)
    assert whole.tolist() == pytest.approx(direct, rel=1e-9)
    assert len(calls) == 1
    monkeypatch.setattr(frechet, "_GROUP_BYTES", 8 * 3 * 4 * 4 * 2)
    parts = resampled_distances(counting(features, [7, 53], calls), 60, reference, resamples=7, seed=5)
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    assert len(calls) == 1 + 4  # groups of two resamples
    assert not torch.allclose(
        resampled_distances(counting(features, [60], calls), 60, reference, resamples=7, seed=6), whole
    )


def test_equal_features_are_equally_far() -> None:
    features, reference = draw(40), statistics(draw(200, seed=1))
    a, b = (resampled_distances(lambda: [features], 40, reference, resamples=5, seed=0) for _ in range(2))
    assert torch.equal(a, b)


def test_what_was_not_announced_is_refused() -> None:
    features, reference = draw(40), statistics(draw(200, seed=1))
    with pytest.raises(ValueError, match="the features hold 40 samples; 41 were announced"):
        resampled_distances(lambda: [features], 41, reference, resamples=5, seed=0)
    with pytest.raises(ValueError, match="hold more than the 39 samples that were announced"):
        resampled_distances(lambda: [features], 39, reference, resamples=5, seed=0)
    with pytest.raises(ValueError, match="features have 3 dimensions, the reference has 4"):
        resampled_distances(lambda: [features[:, :3]], 40, reference, resamples=5, seed=0)
    with pytest.raises(ValueError, match="count=1, resamples=5"):
        next(resample_counts(1, 5, seed=0))
