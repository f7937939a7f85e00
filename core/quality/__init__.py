"""How good images are: the distance to real ones, and to others from the same noise, with intervals.

Nothing here samples, so every stage may measure.
"""

from errata.quality import intervals
from errata.quality.frechet import (
    FeatureStatistics,
    StatisticsAccumulator,
    bootstrap_interval,
    frechet_distance,
    paired_bootstrap,
    statistics,
)
from errata.quality.intervals import Estimate, Interval, mean_estimate
from errata.quality.paired import psnr
from errata.quality.reference import Reference

__all__ = [
    "CONFIDENCE",
    "Estimate",
    "FeatureStatistics",
    "Interval",
    "Reference",
    "StatisticsAccumulator",
    "bootstrap_interval",
    "frechet_distance",
    "mean_estimate",
    "paired_bootstrap",
    "psnr",
    "statistics",
]

CONFIDENCE: float = intervals.CONFIDENCE
"""Of every interval here: how often it holds what it bounds."""
