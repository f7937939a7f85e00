"""Mean and covariance of feature vectors, all at once or as they stream by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        batch = as_features(features)
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


def as_features(features: Tensor) -> Tensor:
    """The same features (N, D), float64 on the CPU.

    Raises:
        ValueError: they are not (N, D), or N is 0.
    """
    require_features(features)
    return features.detach().to("cpu", torch.float64)


def require_features(features: Tensor) -> None:
    """Refuse what is not (N, D) with N at least 1.

    Raises:
        ValueError: it is not.
    """
    if features.ndim != 2 or features.shape[0] == 0:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (samples, dimensions)")


def require_same_dimension(a: int, b: int) -> None:
    """Refuse two sets of features that no distance can compare.

    Raises:
        ValueError: their dimensions differ.
    """
    if a != b:
        raise ValueError(
            f"features have {a} dimensions, the reference has {b}; use one feature network for both"
        )
