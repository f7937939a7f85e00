"""Corrects the sampling errors of a deployed artifact while it runs.

corrected = wrap(deployed, Plan(IEC(), steps="ends:1/10"))
images = corrected(batch_size=16).images
corrected.stats, corrected.overhead()
"""

from errata.correct.corrector import (
    CallView,
    Correction,
    Corrector,
    Evaluation,
    Method,
    Setting,
    StepView,
)
from errata.correct.diffier import DiffIER
from errata.correct.epsilon_scaling import EpsilonScaling
from errata.correct.forecast import Forecast
from errata.correct.hindsight import Hindsight
from errata.correct.iec import IEC
from errata.correct.langevin import Langevin
from errata.correct.lookahead import Lookahead
from errata.correct.noise_levels import NoiseLevels
from errata.correct.pipeline import CorrectedPipeline, wrap
from errata.correct.planner.expectation import Expectation
from errata.correct.plans import Plan
from errata.correct.refresh import Refresh
from errata.correct.second_order import SecondOrder
from errata.correct.stats import RunStats, StepStats, overhead

__all__ = [
    "IEC",
    "CallView",
    "CorrectedPipeline",
    "Correction",
    "Corrector",
    "DiffIER",
    "EpsilonScaling",
    "Evaluation",
    "Expectation",
    "Forecast",
    "Hindsight",
    "Langevin",
    "Lookahead",
    "Method",
    "NoiseLevels",
    "Plan",
    "Refresh",
    "RunStats",
    "SecondOrder",
    "Setting",
    "StepStats",
    "StepView",
    "overhead",
    "wrap",
]
