"""Report: what corrections cost and what quality they buy.

`run` measures quality, time and denoiser calls of each plan on each artifact, from equal seeds, beside
compute-matched alternatives, and writes JSON, Markdown and one self-contained HTML page. Quality is the
Fréchet distance in the features of the `Reference`, and any other `Metric`. `measure` and `merge` are its two
halves, for many jobs.
"""

from errata.quality.frechet import (
    FeatureStatistics,
    StatisticsAccumulator,
    bootstrap_interval,
    frechet_distance,
    paired_bootstrap,
    statistics,
)
from errata.quality.intervals import Estimate, Interval
from errata.quality.metric import Metric, SampleSet
from errata.quality.paired import psnr
from errata.quality.reference import Reference
from errata.renamed import old_names
from errata.report.bundled_report import read_report, recorded_digits
from errata.report.merging import merge
from errata.report.protocol import Protocol, Size
from errata.report.render import free_run_text, text_table
from errata.report.request import ReportRequest, Scorer
from errata.report.results import ComputeMatchedResult, Overhead, Report, Row
from errata.report.runner import measure, run
from errata.report.sharding import Shard
from errata.report.verdict import Verdict

__all__ = [
    "ComputeMatchedResult",
    "Estimate",
    "FeatureStatistics",
    "Interval",
    "Metric",
    "Overhead",
    "Protocol",
    "Reference",
    "Report",
    "ReportRequest",
    "Row",
    "SampleSet",
    "Scorer",
    "Shard",
    "Size",
    "StatisticsAccumulator",
    "Verdict",
    "bootstrap_interval",
    "frechet_distance",
    "free_run_text",
    "measure",
    "merge",
    "paired_bootstrap",
    "psnr",
    "read_report",
    "recorded_digits",
    "run",
    "statistics",
    "text_table",
]

__getattr__ = old_names(__name__, {"RivalResult": "ComputeMatchedResult"})
