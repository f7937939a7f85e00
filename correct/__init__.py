"""Corrects the sampling errors of a deployed artifact while it runs.

    corrected = wrap(deployed, Plan(IEC(), steps="ends:1/10"))
    images = corrected(batch_size=16).images
    corrected.stats, corrected.overhead()

`plan(deployed, max_overhead=0.15, reference=…)` finds out which plan is worth it; `amplification` and
`trajectory_error` show how errors grow.
"""

from errata.correct.analysis import Amplification, TrajectoryError, amplification, trajectory_error
from errata.correct.attachment import Attachment, attach
from errata.correct.corrector import (
    CallView,
    Correction,
    Corrector,
    CorrectorContext,
    Evaluation,
    Method,
    StepView,
)
from errata.correct.diffier import DiffIER
from errata.correct.epsilon_scaling import EpsilonScaling
from errata.correct.fitted_forecast import FittedForecast
from errata.correct.fitting import fit_forecast
from errata.correct.forecast import Forecast
from errata.correct.hindsight import Hindsight
from errata.correct.iec import IEC
from errata.correct.langevin import Langevin
from errata.correct.lookahead import Lookahead
from errata.correct.noise_levels import NoiseLevels
from errata.correct.pipeline import CorrectedPipeline, wrap
from errata.correct.planner.candidates import Candidate, candidates_for
from errata.correct.planner.expectation import Expectation
from errata.correct.planner.planning import plan
from errata.correct.plans import Plan
from errata.correct.refresh import Refresh
from errata.correct.second_order import SecondOrder
from errata.correct.stats import RunStats, StepStats, overhead
from errata.renamed import old_names

__all__ = [
    "IEC",
    "Amplification",
    "Attachment",
    "CallView",
    "Candidate",
    "CorrectedPipeline",
    "Correction",
    "Corrector",
    "CorrectorContext",
    "DiffIER",
    "EpsilonScaling",
    "Evaluation",
    "Expectation",
    "FittedForecast",
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
    "StepStats",
    "StepView",
    "TrajectoryError",
    "amplification",
    "attach",
    "candidates_for",
    "fit_forecast",
    "overhead",
    "plan",
    "trajectory_error",
    "wrap",
]

__getattr__ = old_names(__name__, {"Setting": "CorrectorContext"})
