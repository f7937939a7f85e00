"""Numbers with their uncertainty, and how two of the same seeds compare in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A `CONFIDENCE` interval; both ends in the unit of what it bounds."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference with this interval has a known sign."""
        return self.low > 0 or self.high < 0

    def moved(self, shift: float) -> Interval:
        """Return the interval, shifted."""
        return Interval(self.low + shift, self.high + shift)


@dataclass(frozen=True)
class Estimate:
    """A measured value and its interval."""

    value: float
    interval: Interval

    def to_json(self) -> dict[str, Any]:
        """Return `{"value": …, "interval": [low, high]}`."""
        return {"value": self.value, "interval": [self.interval.low, self.interval.high]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Estimate:
        """Read what `to_json` returned."""
        low, high = value["interval"]
        return cls(float(value["value"]), Interval(float(low), float(high)))


def mean_estimate(values: Tensor, *, confidence: float = CONFIDENCE) -> Estimate:
    """Return the mean of values (N,), N at least 2, with the normal approximation's interval.

    Raises:
        ValueError: fewer than two values, which have no spread.
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"values have shape {tuple(values.shape)}; an interval needs at least 2 values")
    mean = float(values.double().mean())
    quantile = NormalDist().inv_cdf((1 + confidence) / 2)
    half = quantile * float(values.double().std()) / math.sqrt(len(values))
    return Estimate(mean, Interval(mean - half, mean + half))


def centred_interval(resampled: Tensor, measured: float, *, confidence: float = CONFIDENCE) -> Interval:
    """Return the interval of resampled values (R,), shifted until their median is the measured value."""
    tail = (1 - confidence) / 2
    levels = torch.tensor([tail, 0.5, 1 - tail], dtype=torch.float64)
    low, middle, high = torch.quantile(resampled.double(), levels).tolist()
    return Interval(measured + low - middle, measured + high - middle)


@dataclass(frozen=True)
class Measured:
    """A value of one set of samples, with what its uncertainty follows from; values of equal seeds pair.

    Exactly one of `parts` and `replicates` is given.

    Attributes:
        value: what was measured.
        parts: `(N,)`, float64; one for each sample. Their mean is the value, or differs from it by a constant
            that all sets share.
        replicates: `(R,)`, float64; the value of the r-th resampled set. Resampling r takes the same samples
            of every set.
    """

    value: float
    parts: Tensor | None = None
    replicates: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.parts is None) == (self.replicates is None):
            raise ValueError("a measured value needs either parts or replicates")

    @classmethod
    def mean(cls, parts: Tensor) -> Measured:
        """Return the mean of one number for each sample, `(N,)`."""
        parts = parts.double()
        return cls(float(parts.mean()), parts=parts)

    def estimate(self, *, confidence: float = CONFIDENCE) -> Estimate:
        """Return the value with its interval."""
        return _estimate(self.value, self.parts, self.replicates, confidence)

    def minus(self, other: Measured, *, confidence: float = CONFIDENCE) -> Estimate:
        """Return the difference to another value, with the interval of the paired difference.

        Raises:
            ValueError: they are of different kinds or sizes, so nothing pairs.
        """
        difference = self.value - other.value
        for mine, theirs, is_parts in (
            (self.parts, other.parts, True),
            (self.replicates, other.replicates, False),
        ):
            if mine is None or theirs is None:
                continue
            if mine.shape != theirs.shape:
                raise ValueError(f"{len(mine)} and {len(theirs)} numbers do not pair")
            apart = mine - theirs
            return _estimate(difference, apart if is_parts else None, None if is_parts else apart, confidence)
        raise ValueError("a value with parts and one with replicates do not pair")


def _estimate(value: float, parts: Tensor | None, replicates: Tensor | None, confidence: float) -> Estimate:
    if replicates is not None:
        return Estimate(value, centred_interval(replicates, value, confidence=confidence))
    assert parts is not None  # one of the two is there
    spread = mean_estimate(parts, confidence=confidence)
    shift = value - spread.value
    return Estimate(value, spread.interval.moved(shift))
