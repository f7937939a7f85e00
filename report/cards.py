"""What the page says of each correction: its verdict, and the rivals that it was compared with."""

from __future__ import annotations

from dataclasses import dataclass

from errata.quality.intervals import Estimate
from errata.report import formatting
from errata.report.columns import mark_of
from errata.report.results import Report, RivalResult, Row


@dataclass(frozen=True, kw_only=True)
class Whisker:
    """A difference drawn as a bar on a scale of 0 to 100 that all rivals of a plan share.

    `beyond` is "below" or "above" where the value lies outside the scale, at whose end it is drawn.
    """

    low: float
    high: float
    value: float
    zero: float
    mark: str
    beyond: str


@dataclass(frozen=True, kw_only=True)
class RivalLine:
    """A rival as a line of a small table."""

    name: str
    note: str
    compute: str
    distance: str
    difference: str
    interval: str
    whisker: Whisker


@dataclass(frozen=True, kw_only=True)
class Card:
    """A corrected plan and its rivals, the strongest first; those that do not decide the verdict last."""

    row: Row
    rivals: tuple[RivalLine, ...]


def cards_of(report: Report, artifact: str) -> list[Card]:
    """One card for each corrected plan of an artifact."""
    return [Card(row=row, rivals=_rivals(report, row)) for row in report.of(artifact) if row.is_corrected]


def _rivals(report: Report, row: Row) -> tuple[RivalLine, ...]:
    rows = {(each.artifact, each.plan): each for each in report.rows}
    own = [rival for rival in row.rivals if rival.artifact == row.artifact]
    ends = [0.0]  # of the scale; another model's rivals may lie far beyond
    for rival in own or row.rivals:
        ends += [rival.difference.interval.low, rival.difference.interval.high]
    return tuple(
        _line(row, rival, rows[rival.artifact, rival.plan], (min(ends), max(ends)))
        for rival in sorted(row.rivals, key=lambda rival: (rival not in own, -rival.difference.value))
    )


def _line(row: Row, rival: RivalResult, other: Row, ends: tuple[float, float]) -> RivalLine:
    return RivalLine(
        name=_name(other),
        note="" if rival.artifact == row.artifact else "another model: not part of the verdict",
        compute=formatting.percent(rival.compute),
        distance=formatting.value(other.frechet),
        difference=formatting.signed(rival.difference),
        interval=formatting.signed_interval(rival.difference),
        whisker=_whisker(rival.difference, ends),
    )


def _name(other: Row) -> str:
    if other.role == "uncorrected":
        return "no correction"
    return other.stands_for or f"plan {other.plan}"


def _whisker(difference: Estimate, ends: tuple[float, float]) -> Whisker:
    low, high = ends
    interval = difference.interval

    def at(value: float) -> float:
        return 100 * (min(max(value, low), high) - low) / (high - low) if high > low else 50.0

    return Whisker(
        low=at(interval.low),
        high=at(interval.high),
        value=at(difference.value),
        zero=at(0.0),
        mark=mark_of(difference, higher_is_better=False),
        beyond="below" if difference.value < low else "above" if difference.value > high else "",
    )
