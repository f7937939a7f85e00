"""A report for people: an HTML page that needs no network, the same as Markdown, a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from errata.errors import ReportError
from errata.quality import formatting
from errata.quality.metric import Metric
from errata.report.free_runs import TITLE, free_run_lines
from errata.report.growth import amplification_plot, growth_plot
from errata.report.image_grid import Strips, groups_of, tile_of
from errata.report.plots import overhead_plot, pareto_plot
from errata.report.protocol import protocol_lines
from errata.report.results import Report, Row
from errata.report.tables import (
    Cell,
    Column,
    cards_of,
    main_columns,
    measured_metrics,
    metric_columns,
    metric_lines,
)
from errata.report.verdict import headline, rank_warning

_TEMPLATE = "page.html.j2"
_TEXT_HEADERS = (
    "artifact",
    "plan",
    "full+cached",
    "overhead",
    "measured",
    "distance",
    "change (95 % interval)",
)
# Verdicts that the page counts at its top.
_TALLIED = ("pays", "better", "not distinguishable", "does not pay", "worse")


def check_jinja2() -> None:
    """Check that the page can be written.

    Raises:
        ReportError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
    except ImportError as problem:
        raise ReportError("a report needs jinja2; run `pip install errata[report]`") from problem


def html(report: Report, strips: Strips, *, recorded: Report | None = None) -> str:
    """Return the page; `recorded` is an earlier, larger report shown in a section of its own.

    Raises:
        ReportError: jinja2 or matplotlib is not installed.
    """
    check_jinja2()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("errata.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["fmt"] = formatting
    environment.filters["breakable"] = lambda name: name.replace("+", "+\N{ZERO WIDTH SPACE}")
    environment.filters["tied"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    return environment.get_template(_TEMPLATE).render(
        now=_content(report),
        free_title=TITLE,
        pareto=pareto_plot(report),
        groups=groups_of(report, strips),
        tile=tile_of(report),
        recorded=_content(recorded) if recorded is not None else None,
    )


def _content(report: Report) -> dict[str, Any]:
    """Return what the page says of a report, without its images."""
    return {
        "report": report,
        "headline": headline_of(report),
        "free": free_run_lines(report),
        "tally": _tally(report),
        "columns": main_columns(report),
        "metrics": metric_columns(report),
        "sections": [_section(report, artifact) for artifact in report.artifacts],
        "protocol": protocol_lines(report.protocol),
        "metric_protocol": metric_lines(report),
        "has_alternatives": any(row.is_alternative for row in report.rows),
    }


def _tally(report: Report) -> dict[str, int]:
    """Return how many corrected plans got each verdict, without plans that repeat another's steps."""
    kinds = [row.verdict.kind for row in report.rows if row.is_corrected and row.same_steps_as is None]
    return {kind: kinds.count(kind) for kind in _TALLIED if kind in kinds}  # type: ignore[arg-type]


def _section(report: Report, artifact: str) -> dict[str, Any]:
    """Return what the page says of one artifact."""
    growth = report.growth.get(artifact, {})
    amplification = growth.get("amplification")
    return {
        "artifact": artifact,
        "plain": next((row for row in report.of(artifact) if row.verdict.kind == "uncorrected"), None),
        "size": report.sizes.get(artifact),
        "cards": cards_of(report, artifact),
        "has_alternatives": any(row.alternatives for row in report.of(artifact)),
        "overhead": overhead_plot(report, artifact),
        "growth": growth_plot(artifact, growth) if growth.get("relative") else "",
        "amplification": amplification_plot(artifact, amplification) if amplification else "",
        "samples": growth.get("samples"),
    }


def markdown(report: Report) -> str:
    """Return the report as Markdown, without images."""
    protocol = report.protocol
    parts = [
        "# Cost and quality of each correction",
        f"{TITLE}:",
        _table(*free_run_lines(report)),
        headline_of(report),
        _rows_table(report, main_columns(report)),
        "Verdicts, from paired 95 % intervals:",
        "\n".join(
            f"- **{name_of(row)}**: {row.verdict.sentence}" for row in report.rows if not row.is_alternative
        ),
        _titled("Compute-matched alternatives", _alternatives_table(report)),
        "## More metrics, time and memory",
        _rows_table(report, metric_columns(report)),
        _titled("Sizes", _sizes_table(report)),
        "## Protocol",
        _items([*protocol_lines(protocol), *metric_lines(report)]),
        _items(("Note", note) for note in protocol.notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def name_of(row: Row) -> str:
    """Return a row's name: `float model`, `w8a8`, `w8a8, ends:1/10`."""
    if row.is_float:
        return f"float model, {row.plan}" if row.is_alternative else "float model"
    return row.artifact if row.verdict.kind == "uncorrected" else f"{row.artifact}, {row.plan}"


def _rows_table(report: Report, columns: Sequence[Column]) -> str:
    lines = [(name_of(row), *(_text(column.cell(row)) for column in columns)) for row in report.rows]
    return _table(("run", *(column.name for column in columns)), lines)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    interval = f" ({cell.small})" if cell.small else ""
    return f"{cell.text}{interval}{f', {cell.change}' if cell.change else ''}"


def _alternatives_table(report: Report) -> str:
    lines = [
        (
            name_of(card.row),
            line.name,
            line.compute,
            line.distance,
            f"{line.difference} ({line.interval})",
        )
        for artifact in report.artifacts
        for card in cards_of(report, artifact)
        for line in card.alternatives
    ]
    return (
        _table(("plan", "alternative", "compute", "distance", "plan minus alternative"), lines)
        if lines
        else ""
    )


def _sizes_table(report: Report) -> str:
    lines = [
        (name, formatting.size(size.weights), formatting.size(size.float32), f"{size.ratio:.3f}")
        for name, size in report.sizes.items()
    ]
    return _table(("artifact", "weights", "as float32", "ratio"), lines) if lines else ""


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ("---",) * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in rows)


def _titled(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _items(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in pairs)


def text_table(report: Report) -> str:
    """Return the rows aligned for a terminal, with their verdicts and a warning; no trailing newline."""
    metrics = [metric for metric in measured_metrics(report) if metric.in_main_table]
    header = (*_TEXT_HEADERS, *(metric.title for metric in metrics), "verdict")
    table = _text_table(header, [_text_cells(row, metrics) for row in report.rows])
    protocol = report.protocol
    warning = rank_warning(samples=protocol.samples, dimension=protocol.feature_dimension)
    return f"{table}\n\nToo few samples: {warning}" if warning else table


def free_run_text(report: Report) -> str:
    """Return what each artifact does at no extra compute, aligned for a terminal; no trailing newline."""
    return f"{TITLE}:\n\n{_text_table(*free_run_lines(report))}"


def headline_of(report: Report) -> str:
    """Return the report's result in a sentence; plans that repeat another's steps do not count."""
    return headline(
        [(row.artifact, row.verdict.kind) for row in report.rows if row.same_steps_as is None],
        samples=report.protocol.samples,
        dimension=report.protocol.feature_dimension,
    )


def _text_cells(row: Row, metrics: Sequence[Metric]) -> tuple[str, ...]:
    overhead, change = row.overhead if row.is_corrected else None, row.change
    return (
        row.artifact,
        row.plan,
        "+".join(f"{count:.3g}" for count in row.evaluations.values()),
        formatting.percent(overhead.defined) if overhead else "",
        formatting.percent(overhead.measured) if overhead else "",
        formatting.value(row.frechet),
        f"{formatting.signed(change)} ({formatting.signed_interval(change)})" if change else "",
        *(metric.show(found) if (found := row.metrics.get(metric.name)) else "" for metric in metrics),
        row.verdict.label,
    )


def _text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table, numbers to the right; the first two columns and a verdict are words, to the left."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]

    def aligned(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column < 2 or name == "verdict" else cell.rjust(width)
            for column, (name, cell, width) in enumerate(zip(header, line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(aligned, [header, ["-" * width for width in widths], *lines]))
