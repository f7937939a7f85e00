"""The columns of a report's tables: what a row shows in each, and by what it is sorted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from errata.quality.intervals import Estimate
from errata.report import formatting
from errata.report.metrics import Metric, measured_metrics, paired_name
from errata.report.results import Report, Row

# In the order that interests a reader.
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
    """What one row shows: `small` in a line below, `mark` a class of the page's style."""

    text: str
    sort: float
    small: str = ""
    mark: str = ""
    change: str = ""


@dataclass(frozen=True)
class Column:
    """`cell` returns None where a row has nothing to show; such rows are sorted last."""

    name: str
    cell: Callable[[Row], Cell | None]
    kind: str = "num"


def main_columns(report: Report) -> list[Column]:
    """Quality and cost, without columns that nothing is known for."""
    columns = [
        Column("Verdict", _verdict, kind="badge"),
        Column("Fréchet distance", lambda row: _with_interval(row.frechet)),
        Column("Change", lambda row: _signed(row.change)),
        Column("Overhead", _overhead),
        Column("Measured overhead", _measured),
        Column("Compute per image", _compute),
        Column("Pareto front", _front, kind="front"),
        Column(f"PSNR to {paired_name(report)}", _psnr),
    ]
    return _known(columns, report)


def metric_columns(report: Report) -> list[Column]:
    """Everything else that was measured."""
    columns = [_metric_column(name, metric) for name, metric in measured_metrics(report).items()]
    columns += [
        Column("Sampling steps", _steps),
        Column("Calls per image", _calls),
        Column("Time per image", lambda row: _milliseconds(row.seconds_per_image)),
        Column("Peak memory", _memory),
        Column("Energy per image", _energy),
    ]
    return _known(columns, report)


def _known(columns: Sequence[Column], report: Report) -> list[Column]:
    return [column for column in columns if any(column.cell(row) is not None for row in report.rows)]


def _verdict(row: Row) -> Cell:
    kind = row.verdict.kind
    text = "reference" if kind == "float" else kind
    return Cell(text, _VERDICTS.index(kind), mark=kind.replace(" ", "-"))


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
    """Whether a change is for the good, where its sign is known."""
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


def _psnr(row: Row) -> Cell | None:
    if row.psnr is None:
        return None
    text = f"{row.psnr.value:.1f} dB"
    if row.psnr_change is None:
        return Cell(text, row.psnr.value)
    mark = mark_of(row.psnr_change, higher_is_better=True)
    return Cell(text, row.psnr.value, change=f"change {formatting.signed(row.psnr_change)}", mark=mark)


def _metric_column(name: str, metric: Metric) -> Column:
    def cell(row: Row) -> Cell | None:
        shown = _with_interval(row.metrics.get(name))
        change = row.changes.get(name)
        if shown is None or change is None:
            return shown
        mark = mark_of(change, higher_is_better=metric.higher_is_better)
        return Cell(shown.text, shown.sort, shown.small, mark, f"change {formatting.signed(change)}")

    return Column(f"{metric.title} {metric.arrow}", cell)


def _steps(row: Row) -> Cell | None:
    return Cell(str(row.sampling_steps), row.sampling_steps) if row.sampling_steps else None


def _calls(row: Row) -> Cell:
    return Cell(formatting.evaluations(row.evaluations), sum(row.evaluations.values()))


def _memory(row: Row) -> Cell | None:
    return None if row.peak_bytes is None else Cell(formatting.size(row.peak_bytes), row.peak_bytes)


def _energy(row: Row) -> Cell | None:
    joules = row.joules_per_image
    return None if joules is None else Cell(f"{joules:.3g} J", joules)
