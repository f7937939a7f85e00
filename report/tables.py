"""The tables of a report: their columns, and a card with the alternatives of each corrected plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from errata.quality import formatting
from errata.quality.intervals import Estimate
from errata.quality.metric import HEADLINE, Metric, known_metrics
from errata.report.results import ComputeMatchedResult, Report, Row

# By which a column is sorted: what interests a reader first.
_VERDICTS = (
    "pays",
    "better",
    "not distinguishable",
    "does not pay",
    "worse",
    "uncorrected",
    "float",
    "equal compute",
)
_FRONTS = ("on", "near", "off")


@dataclass(frozen=True)
class Cell:
    """What one row shows: `small` in a line below, `mark` is a CSS class of the page."""

    text: str
    sort: float
    small: str = ""
    mark: str = ""
    change: str = ""


@dataclass(frozen=True)
class Column:
    """A column; `cell` returns None if a row has nothing to show, which sorts it last."""

    name: str
    cell: Callable[[Row], Cell | None]
    kind: str = "num"
    is_headline: bool = False


def main_columns(report: Report) -> list[Column]:
    """Return the columns of quality and cost, without empty ones."""
    measured, to = measured_metrics(report), f" to {report.protocol.pairs}"
    columns = [
        Column("Verdict", _verdict, kind="badge"),
        Column(headline_metric().title, lambda row: _with_interval(row.frechet), is_headline=True),
        Column("Change", lambda row: _signed(row.change)),
        Column("Overhead", _overhead),
        Column("Measured overhead", _measured),
        Column("Compute per image", _compute),
        Column("Pareto front", _front, kind="front"),
        *(_metric_column(metric, to) for metric in measured if metric.in_main_table),
    ]
    return _known(columns, report)


def metric_columns(report: Report) -> list[Column]:
    """Return the columns of everything else that was measured."""
    columns = [_metric_column(metric) for metric in measured_metrics(report) if not metric.in_main_table]
    columns += [
        Column("Sampling steps", _steps),
        Column("Calls per image", _calls),
        Column("Time per image", lambda row: _milliseconds(row.seconds_per_image)),
        Column("Peak memory", _memory),
        Column("Energy per image", _energy),
    ]
    return _known(columns, report)


def headline_metric() -> Metric:
    """Return the metric that verdicts and plots are about."""
    return next(metric for metric in known_metrics() if metric.name == HEADLINE)


def measured_metrics(report: Report) -> list[Metric]:
    """Return the metrics that any row has beside the headline, in a fixed order; unknown ones come last."""
    there = dict.fromkeys(name for row in report.rows for name in row.metrics)
    described = {metric.name: metric for metric in (*known_metrics(), *report.own_metrics)}
    known = [metric for name, metric in described.items() if name in there]
    return known + [_unknown(name) for name in there if name not in described]


def metric_lines(report: Report) -> list[tuple[str, str]]:
    """Return how each metric was measured, as pairs of title and text, then further facts."""
    protocol, metrics = report.protocol, measured_metrics(report)
    lines = []
    for metric in metrics:
        fact = protocol.facts.get(metric.name)
        lines.append((metric.title, protocol.describe(metric) + (f"; {fact}" if fact else "")))
    known = {metric.name for metric in (*known_metrics(), *metrics)}
    return lines + [(name, fact) for name, fact in protocol.facts.items() if name not in known]


def _unknown(name: str) -> Metric:
    """Return a metric of another release, which is known by its name alone."""
    return Metric(
        name=name, title=name, higher_is_better=True, needs="images", description="{samples} images"
    )


def _known(columns: Sequence[Column], report: Report) -> list[Column]:
    return [column for column in columns if any(column.cell(row) is not None for row in report.rows)]


def _verdict(row: Row) -> Cell:
    kind = row.verdict.kind
    return Cell(row.verdict.label, _VERDICTS.index(kind), mark=kind.replace(" ", "-"))


def _with_interval(estimate: Estimate | None) -> Cell | None:
    if estimate is None:
        return None
    return Cell(formatting.value(estimate), estimate.value, formatting.interval(estimate))


def _signed(estimate: Estimate | None) -> Cell | None:
    if estimate is None:
        return None
    mark = mark_of(estimate, higher_is_better=False)
    return Cell(formatting.signed(estimate), estimate.value, formatting.signed_interval(estimate), mark)


def mark_of(change: Estimate, *, higher_is_better: bool) -> str:
    """Return "good" or "bad" for a change whose sign is known, else nothing."""
    if not change.interval.excludes_zero:
        return ""
    return "good" if (change.value > 0) == higher_is_better else "bad"


def _overhead(row: Row) -> Cell | None:
    if row.overhead is None or row.change is None:
        return None
    return Cell(formatting.percent(row.overhead.defined), row.overhead.defined)


def _measured(row: Row) -> Cell | None:
    overhead = row.overhead
    if overhead is None or row.change is None:
        return None
    low, high = map(formatting.percent, overhead.spread)
    return Cell(formatting.percent(overhead.measured), overhead.measured, f"{low} to {high}")


def _compute(row: Row) -> Cell | None:
    return _milliseconds(row.compute) if row.compute > 0 else None


def _milliseconds(seconds: float) -> Cell:
    return Cell(formatting.milliseconds(seconds), seconds)


def _front(row: Row) -> Cell | None:
    return None if row.front is None else Cell(row.front, _FRONTS.index(row.front), mark=row.front)


def _metric_column(metric: Metric, to: str = "") -> Column:
    """Return the column of a metric; `to` is added to its title in place of an arrow."""

    def cell(row: Row) -> Cell | None:
        estimate, change = row.metrics.get(metric.name), row.changes.get(metric.name)
        if estimate is None:
            return None
        shown = Cell(metric.show(estimate), estimate.value, metric.show_interval(estimate))
        if change is None:
            return shown
        mark = mark_of(change, higher_is_better=metric.higher_is_better)
        return replace(shown, mark=mark, change=f"change {formatting.signed(change)}")

    return Column(f"{metric.title}{to or f' {metric.arrow}'}", cell)


def _steps(row: Row) -> Cell | None:
    return Cell(str(row.sampling_steps), row.sampling_steps) if row.sampling_steps else None


def _calls(row: Row) -> Cell:
    return Cell(formatting.evaluations(row.evaluations), sum(row.evaluations.values()))


def _memory(row: Row) -> Cell | None:
    return None if row.peak_bytes is None else Cell(formatting.size(row.peak_bytes), row.peak_bytes)


def _energy(row: Row) -> Cell | None:
    joules = row.joules_per_image
    return None if joules is None else Cell(f"{joules:.3g} J", joules)


@dataclass(frozen=True, kw_only=True)
class Whisker:
    """A difference drawn as a bar, on a scale of 0 to 100 that all alternatives of a plan share.

    `beyond` is "below" or "above" if the value lies outside the scale; it is drawn at that end.
    """

    low: float
    high: float
    value: float
    zero: float
    mark: str
    beyond: str


@dataclass(frozen=True, kw_only=True)
class AlternativeLine:
    """A compute-matched alternative, as a line of a small table."""

    name: str
    note: str
    compute: str
    distance: str
    difference: str
    interval: str
    whisker: Whisker


@dataclass(frozen=True, kw_only=True)
class Card:
    """A corrected plan and its alternatives, best first; those that do not decide the verdict come last."""

    row: Row
    alternatives: tuple[AlternativeLine, ...]


def cards_of(report: Report, artifact: str) -> list[Card]:
    """Return a card for each corrected plan of an artifact."""
    corrected = [row for row in report.of(artifact) if row.is_corrected]
    return [Card(row=row, alternatives=_alternatives(report, row)) for row in corrected]


def _alternatives(report: Report, row: Row) -> tuple[AlternativeLine, ...]:
    rows = {(each.artifact, each.plan): each for each in report.rows}
    own = [each for each in row.alternatives if each.artifact == row.artifact]
    ends = [0.0]  # of the scale; another model may lie far beyond
    for each in own or row.alternatives:
        ends += [each.difference.interval.low, each.difference.interval.high]
    return tuple(
        _line(row, each, rows[each.artifact, each.plan], (min(ends), max(ends)))
        for each in sorted(row.alternatives, key=lambda each: (each not in own, -each.difference.value))
    )


def _line(row: Row, result: ComputeMatchedResult, other: Row, ends: tuple[float, float]) -> AlternativeLine:
    return AlternativeLine(
        name=_name(other),
        note="" if result.artifact == row.artifact else "another model: not part of the verdict",
        compute=formatting.percent(result.compute),
        distance=formatting.value(other.frechet),
        difference=formatting.signed(result.difference),
        interval=formatting.signed_interval(result.difference),
        whisker=_whisker(result.difference, ends),
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
