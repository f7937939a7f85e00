import pytest
import torch
from torch import Tensor

from errata.errors import ReportError
from errata.quality.kid import kernel_distance_parts, kernel_distances, mmd2, subset_size_for


def draw(count: int, dimension: int = 5, *, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed)).double() + shift


def test_a_loop_over_pairs_gives_the_same() -> None:
    x, y = draw(7), draw(6, seed=1, shift=0.5)

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 5 + 1) ** 3

    within = sum(kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    within += sum(kernel(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / 30
    across = sum(kernel(a, b) for a in x for b in y) / 42
    assert float(mmd2(x, y)) == pytest.approx(within - 2 * across, rel=1e-12)


def test_two_halves_of_one_distribution_are_as_far_apart_as_nothing() -> None:
    distances = [float(mmd2(draw(50, seed=seed), draw(50, seed=1000 + seed))) for seed in range(200)]
    mean, error = torch.tensor(distances).mean(), torch.tensor(distances).std() / 200**0.5
    assert abs(float(mean)) < 3 * float(error)
    assert min(distances) < 0


def test_subsets_of_equally_many_rows_are_paired() -> None:
    features, real = draw(40), draw(60, seed=1)
    first = kernel_distances(features, real, subsets=5, subset_size=20, seed=3)
    assert first.shape == (5,)
    assert first.dtype == torch.float64
    again = kernel_distances(features.float(), real.float(), subsets=5, subset_size=20, seed=3)
    torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-6)
    assert not torch.equal(kernel_distances(features, real, subsets=5, subset_size=20, seed=4), first)
    changes = kernel_distances(features + 0.01, real, subsets=50, subset_size=20) - kernel_distances(
        features, real, subsets=50, subset_size=20
    )
    unpaired = kernel_distances(features, real, subsets=50, subset_size=20)
    assert changes.std() < 0.2 * unpaired.std()


def test_a_subset_is_no_larger_than_the_sets() -> None:
    assert subset_size_for(30, 20, 1000) == 20
    assert subset_size_for(30, 20, 10) == 10
    whole = kernel_distances(draw(20), draw(20, seed=1), subsets=2)
    torch.testing.assert_close(whole, mmd2(draw(20), draw(20, seed=1)).expand(2))


def test_what_has_no_pairs_is_refused() -> None:
    with pytest.raises(ReportError, match="of 1 images to 20 real ones in subsets of 1000 has no pairs"):
        kernel_distances(draw(1), draw(20))
    with pytest.raises(ReportError, match="subsets=0 of a kernel distance; at least 1"):
        kernel_distances(draw(20), draw(20), subsets=0)
    with pytest.raises(ValueError, match="features have 5 dimensions, the reference has 4"):
        kernel_distances(draw(20), draw(20, 4))


@pytest.mark.parametrize("block", [3, 1000])
def test_the_mean_of_the_parts_is_the_distance_of_the_whole_sets(block: int) -> None:
    x, y = draw(40), draw(25, seed=1, shift=0.5)
    parts = kernel_distance_parts(x, y, block=block)
    assert parts.shape == (40,)
    assert float(parts.mean()) == pytest.approx(float(mmd2(x, y)), rel=1e-10)


def test_the_parts_scatter_as_the_distance_does() -> None:
    """Their standard error is that of many distances of fresh samples to the same real ones."""
    real = draw(400, seed=9)
    fresh = [kernel_distance_parts(draw(300, seed=seed, shift=0.3), real) for seed in range(120)]
    measured = torch.stack([parts.mean() for parts in fresh]).std()
    promised = torch.stack([parts.std() / 300**0.5 for parts in fresh]).mean()
    assert float(promised / measured) == pytest.approx(1, abs=0.2)
