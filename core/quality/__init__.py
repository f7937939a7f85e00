"""How good images are: against real ones, their prompts, or others from the same noise, with intervals.

Nothing here samples, so every stage may measure. `ClipScore`, `InceptionFeatures`, `Lpips` and
`VisionFeatures` need further packages and say which when they are made.
"""

from errata.quality import intervals
from errata.quality.clip_score import ClipScore
from errata.quality.frechet import (
    FeatureStatistics,
    StatisticsAccumulator,
    bootstrap_interval,
    frechet_distance,
    paired_bootstrap,
    resampled_distances,
    statistics,
)
from errata.quality.inception import InceptionFeatures
from errata.quality.inception_score import (
    inception_score,
    resampled_inception_scores,
    weighted_inception_score,
)
from errata.quality.intervals import Estimate, Interval, Measured, mean_estimate
from errata.quality.kid import kernel_distances, subset_size_for
from errata.quality.metric import Metric, SampleSet, known_metrics
from errata.quality.network import open_network
from errata.quality.paired import Lpips, psnr, ssim
from errata.quality.precision_recall import precision_and_recall
from errata.quality.reference import Reference
from errata.quality.vision import VisionFeatures

__all__ = [
    "CONFIDENCE",
    "ClipScore",
    "Estimate",
    "FeatureStatistics",
    "InceptionFeatures",
    "Interval",
    "Lpips",
    "Measured",
    "Metric",
    "Reference",
    "SampleSet",
    "StatisticsAccumulator",
    "VisionFeatures",
    "bootstrap_interval",
    "frechet_distance",
    "inception_score",
    "kernel_distances",
    "known_metrics",
    "mean_estimate",
    "open_network",
    "paired_bootstrap",
    "precision_and_recall",
    "psnr",
    "resampled_distances",
    "resampled_inception_scores",
    "ssim",
    "statistics",
    "subset_size_for",
    "weighted_inception_score",
]

CONFIDENCE: float = intervals.CONFIDENCE
"""Of every interval here: how often it holds what it bounds."""
