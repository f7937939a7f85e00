"""The usual file of reference statistics: an `.npz` with `mu` and `sigma`, checked before it is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from errata.errors import ReportError
from errata.quality.moments import FeatureStatistics

# Rounding of a float32 covariance stays below this part of its largest value.
_TOLERANCE = 1e-6


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
    """Statistics of `mu` (D,), `sigma` (D, D) and `count` if it is there; and `features` (M, D) float32 if
    they are.

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
        raise ReportError(f"statistics file `{path}` holds values that are no finite real numbers")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    _check_covariance(path, covariance)
    statistics = FeatureStatistics(
        torch.from_numpy(mean), torch.from_numpy(covariance), _count(path, arrays.get("count"))
    )
    return statistics, _features(path, arrays.get("features"), mean.size)


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
            f"statistics file `{path}` lacks {', '.join(sorted(missing))}; it holds {sorted(arrays)}, "
            "and needs mu (D,) and sigma (D, D)"
        )
    return arrays


def _is_finite(array: np.ndarray) -> bool:
    return array.dtype.kind in "fiu" and bool(np.isfinite(array).all())


def _count(path: Path, stored: np.ndarray | None) -> int:
    if stored is None:
        return 0
    if stored.ndim != 0 or stored.dtype.kind not in "iu" or stored < 0:
        raise ReportError(
            f"statistics file `{path}`: count has shape {stored.shape} and type {stored.dtype}; expected "
            "one integer, 0 or more; store np.asarray(number of images), or leave it out"
        )
    return int(stored)


def _features(path: Path, stored: np.ndarray | None, dimension: int) -> Tensor | None:
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
            f"is {eigenvalues[-1]:.3g}), so it is no covariance; store np.cov(features.T)"
        )
