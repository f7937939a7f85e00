"""Which rows are worth having at all: the Pareto front of compute and distance."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

from errata.quality.measured import Measured
from errata.report.results import Front

Name = TypeVar("Name", bound=Hashable)


def fronts(points: Mapping[Name, tuple[float, Measured]]) -> dict[Name, Front]:
    """For each point of compute and distance (both better when lower), where it lies.

    "on": no other point is as good in both and better in one. "near": some are, but by a distance that can be
    told from none for no one of them. "off": some are, beyond doubt.
    """
    return {name: _place(name, points) for name in points}


def _place(name: Name, points: Mapping[Name, tuple[float, Measured]]) -> Front:
    compute, distance = points[name]
    dominating = [
        other
        for key, (cost, other) in points.items()
        if key != name and _dominates((cost, other.value), (compute, distance.value))
    ]
    if not dominating:
        return "on"
    is_beyond_doubt = any(distance.minus(other).interval.low > 0 for other in dominating)
    return "off" if is_beyond_doubt else "near"


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other
