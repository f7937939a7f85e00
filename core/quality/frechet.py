"""Fréchet distance between two sets of feature vectors, and how much of it is sampling noise.

| symbol   | name here         | meaning                                      |
|----------|-------------------|----------------------------------------------|
| μ, Σ     | `FeatureStatistics` | mean (D,) and unbiased covariance (D, D)   |
| Σ^(1/2)  | `symmetric_root`  | the symmetric positive square root           |
| FD       | `frechet_distance` | ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 ‖Σ_a^(1/2) Σ_b^(1/2)‖_* |

‖·‖_* is the sum of the singular values, equal to tr (Σ_a^(1/2) Σ_b Σ_a^(1/2))^(1/2) and better conditioned.
A distance compares only with others in the same feature network, against the same reference, at the same
number of samples: with few samples it is biased upwards, by the same amount for every plan.

Source: Dowson and Landau 1982, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.quality.intervals import Interval, centred_interval

# Below this many dimensions, threads cost a decomposition more than they gain (64 dimensions on a busy
# machine: 0.2 ms with one thread, 70 ms with two).
_THREADS_PAY_FROM = 512


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean (D,) and unbiased covariance (D, D), both float64 on the CPU, of `count` feature vectors."""

    mean: Tensor
    covariance: Tensor
    count: int

    @property
    def dimension(self) -> int:
        """Number of features, D."""
        return self.mean.shape[0]


class StatisticsAccumulator:
    """Mean and covariance of a stream of feature batches, in memory that does not grow with it.

    Source: Chan, Golub and LeVeque 1983, the pairwise update of a mean and a sum of squares.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def add(self, features: Tensor) -> None:
        """Take in features (B, D) of any floating-point type.

        Raises:
            ValueError: not (B, D), or of another D than before.
        """
        batch = _as_features(features)
        count = batch.shape[0]
        mean = batch.mean(dim=0)
        centred = batch - mean
        scatter = centred.T @ centred
        if self._mean is None or self._scatter is None:
            self._count, self._mean, self._scatter = count, mean, scatter
            return
        if mean.shape != self._mean.shape:
            raise ValueError(f"features have {mean.shape[0]} dimensions, earlier ones {self._mean.shape[0]}")
        total = self._count + count
        delta = mean - self._mean
        self._scatter += scatter + torch.outer(delta, delta) * (self._count * count / total)
        self._mean += delta * (count / total)
        self._count = total

    def statistics(self) -> FeatureStatistics:
        """Statistics of everything added so far.

        Raises:
            ValueError: fewer than two samples, which have no covariance.
        """
        if self._mean is None or self._scatter is None or self._count < 2:
            raise ValueError(f"{self._count} samples have no covariance; add at least 2")
        return FeatureStatistics(self._mean.clone(), self._scatter / (self._count - 1), self._count)


def statistics(features: Tensor) -> FeatureStatistics:
    """Statistics of features (N, D), N at least 2, computed in float64."""
    accumulator = StatisticsAccumulator()
    accumulator.add(features)
    return accumulator.statistics()


def symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite (D, D); eigenvalues below zero count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the two Gaussians; 0 for a set with itself.

    Raises:
        ValueError: the statistics have different dimensions.
    """
    _require_same_dimension(a.dimension, b.dimension)
    return _distance_to_root(a, b, symmetric_root(b.covariance))


def bootstrap_interval(
    features: Tensor, reference: FeatureStatistics, *, resamples: int = 200, seed: int = 0
) -> Interval:
    """Interval of the distance of features (N, D) to `reference` under resampling of the N samples.

    Resampling adds a bias of its own, so the resampled distances are moved until their median is the measured
    distance. The interval describes the scatter at this N, and leaves the bias of a small N where it is; the
    reference counts as known.
    """
    measured = frechet_distance(statistics(features), reference)
    (resampled,) = _resample([features], reference, resamples=resamples, seed=seed)
    return centred_interval(resampled, measured)


def paired_bootstrap(
    features_a: Tensor,
    features_b: Tensor,
    reference: FeatureStatistics,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """Interval of FD(b) − FD(a); row i of both feature sets (N, D) comes from the same noise.

    The same rows are drawn for both, so what the two sets share cancels. Centred as in `bootstrap_interval`.

    Raises:
        ValueError: the sets have different shapes.
    """
    if features_a.shape != features_b.shape:
        raise ValueError(
            f"paired features have shapes {tuple(features_a.shape)} and {tuple(features_b.shape)}"
        )
    measured = frechet_distance(statistics(features_b), reference) - frechet_distance(
        statistics(features_a), reference
    )
    a, b = _resample([features_a, features_b], reference, resamples=resamples, seed=seed)
    return centred_interval(b - a, measured)


def _resample(sets: list[Tensor], reference: FeatureStatistics, *, resamples: int, seed: int) -> list[Tensor]:
    """Distances (resamples,) to the reference for each set, the same rows drawn for all of them."""
    if resamples < 2:
        raise ValueError(f"resamples={resamples}; an interval needs at least 2")
    root = symmetric_root(reference.covariance)
    generator = torch.Generator().manual_seed(seed)
    prepared = [_as_features(features) for features in sets]
    for features in prepared:
        _require_same_dimension(features.shape[1], reference.dimension)
    count = prepared[0].shape[0]
    distances = torch.empty(len(sets), resamples, dtype=torch.float64)
    with _threads_for(reference.dimension):
        for resample in range(resamples):
            rows = torch.randint(count, (count,), generator=generator)
            for index, features in enumerate(prepared):
                drawn = statistics(features[rows])
                distances[index, resample] = _distance_to_root(drawn, reference, root)
    return list(distances)


@contextmanager
def _threads_for(dimension: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if dimension < _THREADS_PAY_FROM:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _distance_to_root(a: FeatureStatistics, b: FeatureStatistics, root: Tensor) -> float:
    """The distance, given Σ_b^(1/2)."""
    shift = (a.mean - b.mean).square().sum()
    overlap = torch.linalg.svdvals(symmetric_root(a.covariance) @ root).sum()
    distance = shift + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(0.0, float(distance))


def _as_features(features: Tensor) -> Tensor:
    if features.ndim != 2 or features.shape[0] == 0:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (samples, dimensions)")
    return features.detach().to("cpu", torch.float64)


def _require_same_dimension(a: int, b: int) -> None:
    if a != b:
        raise ValueError(
            f"features have {a} dimensions, the reference has {b}; use one feature network for both"
        )
