"""Mean and covariance of feature vectors: all at once, as they stream by, and as the usual `.npz` file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errata.errors import ReportError

# Rounding of a float32 covariance stays below this part of its largest value.
_TOLERANCE = 1e-6


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
        """Return the statistics of everything added so far.

        Raises:
            ValueError: fewer than two samples, which have no covariance.
        """
        if self._mean is None or self._scatter is None or self._count < 2:
            raise ValueError(f"{self._count} samples have no covariance; add at least 2")
        return FeatureStatistics(self._mean.clone(), self._scatter / (self._count - 1), self._count)


def statistics(features: Tensor) -> FeatureStatistics:
    """Return the statistics of features (N, D), N at least 2, computed in float64."""
    accumulator = StatisticsAccumulator()
    accumulator.add(features)
    return accumulator.statistics()


def as_features(features: Tensor) -> Tensor:
    """Return the same features (N, D), float64 on the CPU.

    Raises:
        ValueError: they are not (N, D), or N is 0.
    """
    check_features(features)
    return features.detach().to("cpu", torch.float64)


def check_features(features: Tensor) -> None:
    """Check that features are (N, D) with N at least 1.

    Raises:
        ValueError: they are not.
    """
    if features.ndim != 2 or features.shape[0] == 0:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected (samples, dimensions)")


def check_same_dimension(a: int, b: int) -> None:
    """Check that two sets of features have the same dimension.

    Raises:
        ValueError: their dimensions differ.
    """
    if a != b:
        raise ValueError(
            f"features have {a} dimensions, the reference has {b}; use one feature network for both"
        )


def write_statistics(path: Path, statistics: FeatureStatistics, features: Tensor | None = None) -> None:
    """Write `mu`, `sigma` and `count`, and `features` (M, D) as float32 if there are any."""
    more = {} if features is None else {"features": features.float().numpy()}
    np.savez(
        path,
        allow_pickle=False,
        mu=statistics.mean.numpy(),
        sigma=statistics.covariance.numpy(),
        count=np.asarray(statistics.count, dtype=np.int64),
        **more,
    )


def read_statistics(path: Path) -> tuple[FeatureStatistics, Tensor | None]:
    """Return statistics from `mu` (D,), `sigma` (D, D) and an optional `count`, and optional features (M, D).

    Raises:
        ReportError: the file is missing, unreadable, lacks an array, or holds what cannot be a mean, a
            covariance, a count and features.
    """
    arrays = _read_arrays(path)
    mean, covariance = np.asarray(arrays["mu"]), np.asarray(arrays["sigma"])
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise ReportError(
            f"statistics file `{path}`: mu has shape {mean.shape}, sigma {covariance.shape}; "
            "expected (D,) and (D, D)"
        )
    if not (_is_finite(mean) and _is_finite(covariance)):
        raise ReportError(f"statistics file `{path}` holds values that are not finite real numbers")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    _check_covariance(path, covariance)
    statistics = FeatureStatistics(
        torch.from_numpy(mean), torch.from_numpy(covariance), _read_count(path, arrays.get("count"))
    )
    return statistics, _read_features(path, arrays.get("features"), mean.size)


def _read_arrays(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays: dict[str, Any] = {name: stored[name] for name in stored.files}
    except FileNotFoundError as problem:
        raise ReportError(f"statistics file `{path}` does not exist") from problem
    except Exception as problem:  # a hostile zip raises nearly anything
        raise ReportError(f"statistics file `{path}` cannot be read as .npz: {problem}") from problem
    missing = {"mu", "sigma"} - arrays.keys()
    if missing:
        raise ReportError(
            f"statistics file `{path}` has no {', '.join(sorted(missing))}; it holds {sorted(arrays)}, "
            "and needs mu (D,) and sigma (D, D)"
        )
    return arrays


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiu" and bool(np.isfinite(array).all())


def _read_count(path: Path, stored: np.ndarray | None) -> int:
    if stored is None:
        return 0
    if stored.ndim != 0 or stored.dtype.kind not in "iu" or stored < 0:
        raise ReportError(
            f"statistics file `{path}`: count has shape {stored.shape} and type {stored.dtype}; expected "
            "one integer, 0 or more; store np.asarray(number of images), or leave it out"
        )
    return int(stored)


def _read_features(path: Path, stored: np.ndarray | None, dimension: int) -> Tensor | None:
    if stored is None:
        return None
    if stored.ndim != 2 or not len(stored) or stored.shape[1] != dimension or not _is_finite(stored):
        raise ReportError(
            f"statistics file `{path}`: features have shape {stored.shape} and type {stored.dtype}; expected "
            f"finite numbers (M, {dimension}), the features of some of the images; store them, or leave them "
            "out"
        )
    return torch.from_numpy(stored.astype(np.float32))


def _check_covariance(path: Path, covariance: np.ndarray) -> None:
    largest = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > _TOLERANCE * largest:
        raise ReportError(
            f"statistics file `{path}`: sigma is not symmetric; store the covariance, np.cov(features.T)"
        )
    eigenvalues = np.linalg.eigvalsh(covariance)
    if eigenvalues[0] < -_TOLERANCE * np.abs(eigenvalues).max():
        raise ReportError(
            f"statistics file `{path}`: sigma has the negative eigenvalue {eigenvalues[0]:.3g} (the largest "
            f"is {eigenvalues[-1]:.3g}), so it is not a covariance; store np.cov(features.T)"
        )
