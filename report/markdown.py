"""A report as Markdown: the page without its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from errata.report import formatting
from errata.report.cards import cards_of
from errata.report.columns import Cell, Column, main_columns, metric_columns
from errata.report.metrics import metric_lines
from errata.report.results import Report, Row
from errata.report.text import headline_of, protocol_lines


def markdown(report: Report) -> str:
    """The report without its pictures."""
    protocol = report.protocol
    parts = [
        "# What each overhead bought",
        headline_of(report),
        _rows_table(report, main_columns(report)),
        "Verdicts, each from paired 95 % intervals:",
        "\n".join(f"- **{name_of(row)}**: {row.verdict.sentence}" for row in report.rows if not row.is_rival),
        _section("What else the compute buys", _rivals_table(report)),
        "## More metrics, time and memory",
        _rows_table(report, metric_columns(report)),
        _section("Sizes", _sizes_table(report)),
        "## Protocol",
        _items([*protocol_lines(report), *metric_lines(report)]),
        _items(("Note", note) for note in protocol.notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def name_of(row: Row) -> str:
    """A row in a word or three: `float model`, `w8a8`, `w8a8, ends:1/10`."""
    if row.is_float:
        return f"float model, {row.plan}" if row.is_rival else "float model"
    return row.artifact if row.verdict.kind == "uncorrected" else f"{row.artifact}, {row.plan}"


def _rows_table(report: Report, columns: Sequence[Column]) -> str:
    lines = [(name_of(row), *(_text(column.cell(row)) for column in columns)) for row in report.rows]
    return _table(("run", *(column.name for column in columns)), lines)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    interval = f" ({cell.small})" if cell.small else ""
    return f"{cell.text}{interval}{f', {cell.change}' if cell.change else ''}"


def _rivals_table(report: Report) -> str:
    lines = [
        (
            name_of(card.row),
            rival.name,
            rival.compute,
            rival.distance,
            f"{rival.difference} ({rival.interval})",
        )
        for artifact in report.artifacts
        for card in cards_of(report, artifact)
        for rival in card.rivals
    ]
    return _table(("plan", "rival", "compute", "distance", "plan minus rival"), lines) if lines else ""


def _sizes_table(report: Report) -> str:
    lines = [
        (name, formatting.size(size.weights), formatting.size(size.float32), f"{size.ratio:.3f}")
        for name, size in report.sizes.items()
    ]
    return _table(("artifact", "weights", "as float32", "ratio"), lines) if lines else ""


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ("---",) * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in rows)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _items(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in pairs)
