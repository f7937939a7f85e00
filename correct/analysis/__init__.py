"""Measures why a correction helps: how a sampler's steps amplify errors, and how errors grow along a run.

growth = amplification(deployed)
growth.plot("growth.png")
errors = trajectory_error(deployed, float_pipe, plans={"IEC": Plan(IEC())})
errors.plot("errors.png")
"""

from errata.correct.analysis.amplification_measure import Amplification, amplification
from errata.correct.analysis.trajectories import TrajectoryError, trajectory_error
from errata.correct.analysis.values import Values

__all__ = [
    "Amplification",
    "TrajectoryError",
    "Values",
    "amplification",
    "trajectory_error",
]
