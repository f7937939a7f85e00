"""Numbers that carry their uncertainty."""

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
        """The same width elsewhere."""
        return Interval(self.low + shift, self.high + shift)


@dataclass(frozen=True)
class Estimate:
    """A measured value and its interval."""

    value: float
    interval: Interval

    def to_json(self) -> dict[str, Any]:
        """`{"value": …, "interval": [low, high]}`."""
        return {"value": self.value, "interval": [self.interval.low, self.interval.high]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Estimate:
        """Inverse of `to_json`."""
        low, high = value["interval"]
        return cls(float(value["value"]), Interval(float(low), float(high)))


def mean_estimate(values: Tensor, *, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of values (N,), N at least 2, with the normal approximation's interval.

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
    """Interval of resampled values (R,), moved until their median is the measured value."""
    tail = (1 - confidence) / 2
    levels = torch.tensor([tail, 0.5, 1 - tail], dtype=torch.float64)
    low, middle, high = torch.quantile(resampled.double(), levels).tolist()
    return Interval(measured + low - middle, measured + high - middle)
