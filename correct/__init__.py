"""Correction of a deployed artifact's sampling errors while it runs.

    corrected = wrap(deployed, Plan(IEC(), steps="ends:1/10"))
    images = corrected(batch_size=16).images
    corrected.stats, corrected.overhead()

`plan(deployed, max_overhead=0.15, reference=…)` finds the plan that is worth it; `amplification` and
`trajectory_error` show how errors grow. The methods are in `errata.correct.methods`; `register_method` adds
one.
"""

from collections.abc import Mapping

from errata.correct import registry
from errata.correct.analysis.amplification_measure import Amplification, amplification
from errata.correct.analysis.trajectories import TrajectoryError, trajectory_error
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
from errata.correct.fitting import fit_forecast
from errata.correct.methods.diffier import DiffIER
from errata.correct.methods.epsilon_scaling import EpsilonScaling
from errata.correct.methods.fitted_forecast import FittedForecast
from errata.correct.methods.forecast import Forecast
from errata.correct.methods.hindsight import Hindsight
from errata.correct.methods.iec import IEC
from errata.correct.methods.langevin import Langevin
from errata.correct.methods.lookahead import Lookahead
from errata.correct.methods.refresh import Refresh
from errata.correct.methods.second_order import SecondOrder
from errata.correct.methods.sheet import Sheet
from errata.correct.noise_levels import NoiseLevels
from errata.correct.pipeline import CorrectedPipeline, wrap
from errata.correct.planner import auto as _auto  # noqa: F401 - it is what Plan.auto does
from errata.correct.planner.candidates import Candidate, candidates_for
from errata.correct.planner.expectation import Expectation
from errata.correct.planner.planning import plan
from errata.correct.plans import Plan
from errata.correct.registry import register_method
from errata.correct.sheets.fitting import NoGainError, fit_sheet
from errata.correct.stats import RunStats, StepStats, overhead
from errata.correct.traits import Traits
from errata.renamed import old_names

__all__ = [
    "IEC",
    "METHODS",
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
    "NoGainError",
    "NoiseLevels",
    "Plan",
    "Refresh",
    "RunStats",
    "SecondOrder",
    "Sheet",
    "StepStats",
    "StepView",
    "Traits",
    "TrajectoryError",
    "amplification",
    "attach",
    "candidates_for",
    "fit_forecast",
    "fit_sheet",
    "overhead",
    "plan",
    "register_method",
    "trajectory_error",
    "wrap",
]

METHODS: Mapping[str, type[Method]] = registry.METHODS
"""Registered methods by class name, which plan files and the command line know."""

# A registered method can be found here by its class name, so that a new one needs no line in this file.
__getattr__ = old_names(__name__, {"Setting": "CorrectorContext"}, others=METHODS)
