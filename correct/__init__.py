"""Corrects the sampling errors of a deployed artifact while it runs.

corrected = wrap(deployed, Plan(IEC(), steps="ends:1/10"))
images = corrected(batch_size=16).images
corrected.stats, corrected.overhead()
"""

from errata.correct.corrector import Correction, Corrector, Method, StepView
from errata.correct.iec import IEC
from errata.correct.pipeline import CorrectedPipeline, wrap
from errata.correct.plan import Plan
from errata.correct.stats import RunStats, StepStats, overhead

__all__ = [
    "IEC",
    "CorrectedPipeline",
    "Correction",
    "Corrector",
    "Method",
    "Plan",
    "RunStats",
    "StepStats",
    "StepView",
    "overhead",
    "wrap",
]
