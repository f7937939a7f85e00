"""Report: what each overhead bought.

`run` measures quality, time and denoiser calls of each plan on each artifact, from equal seeds, with what
else the same compute buys, and writes JSON, Markdown and one self-contained HTML page. Quality is the Fréchet
distance in the features of the `Reference`. `measure` and `merge` are its two halves, for many jobs.
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
from errata.quality.paired import psnr
from errata.quality.reference import Reference
from errata.report.measuring import measure
from errata.report.merging import merge, read_report
from errata.report.protocol import Protocol
from errata.report.recorded import recorded_digits
from errata.report.reporting import run
from errata.report.results import Overhead, Report, RivalResult, Row, Size
from errata.report.scoring import Scorer
from errata.report.shares import Shard
from errata.report.text import text_table
from errata.report.verdict import Verdict

__all__ = [
    "Estimate",
    "FeatureStatistics",
    "Interval",
    "Overhead",
    "Protocol",
    "Reference",
    "Report",
    "RivalResult",
    "Row",
    "Scorer",
    "Shard",
    "Size",
    "StatisticsAccumulator",
    "Verdict",
    "bootstrap_interval",
    "frechet_distance",
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
