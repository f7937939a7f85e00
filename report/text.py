"""A report in words: an aligned table, the headline, the protocol."""

from __future__ import annotations

from collections.abc import Sequence

from errata.report import formatting
from errata.report.results import Report, Row
from errata.report.verdict import headline, rank_warning

_TEXT_HEADERS = (
    "artifact",
    "plan",
    "full+cached",
    "overhead",
    "measured",
    "distance",
    "change (95 % interval)",
    "PSNR",
    "verdict",
)


def text_table(report: Report) -> str:
    """The rows aligned for a terminal, with a verdict each, and a warning; no trailing newline."""
    lines: list[tuple[str, ...]] = [_TEXT_HEADERS]
    lines += [_text_cells(row) for row in report.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_TEXT_HEADERS))]
    lines.insert(1, tuple("-" * width for width in widths))
    table = "\n".join(_aligned(line, widths) for line in lines)
    protocol = report.protocol
    warning = rank_warning(samples=protocol.samples, dimension=protocol.feature_dimension)
    return f"{table}\n\nToo few samples: {warning}" if warning else table


def headline_of(report: Report) -> str:
    """What the report says in short; a plan that repeats another one's steps does not count."""
    return headline(
        [(row.artifact, row.verdict.kind) for row in report.rows if row.same_steps_as is None],
        samples=report.protocol.samples,
        dimension=report.protocol.feature_dimension,
    )


def protocol_lines(report: Report) -> list[tuple[str, str]]:
    """The protocol as pairs of name and text, for people."""
    p = report.protocol
    height, width, channels = p.image_size
    versions = ", ".join(f"{name} {version}" for name, version in sorted(p.versions.items()))
    reference = f"{p.reference_count} images" if p.reference_count else "an unstated number of images"
    lines = [
        (
            "Metric",
            f"{p.metric} ({p.feature_dimension} features; lower is better; comparable only with itself)",
        ),
        ("Feature network", f"{p.feature_network}, weights SHA-256 {p.feature_digest}"),
        ("Reference", f"{p.reference}; {reference}"),
        (
            "Samples",
            f"{p.samples} per row, seeds {p.seed} to {p.seed + p.samples - 1}, the same for every row",
        ),
        (
            "Images",
            f"{width}×{height}, {channels} channel{'s' * (channels > 1)}, float32 in [0, 1], not resized",
        ),
        ("Sampling", f"{p.steps} steps, batches of {p.batch_size}"),
        ("Intervals", f"95 %, bootstrap with {p.resamples} resamples; differences resample both sides alike"),
        ("Machine", f"{p.machine}; device {p.device}, {p.threads} thread{'s' * (p.threads > 1)}"),
        ("Versions", versions),
        ("Date", p.date),
        ("Command", p.command),
    ]
    return [(name, text) for name, text in lines if text]


def _text_cells(row: Row) -> tuple[str, ...]:
    overhead, change = row.overhead if row.is_corrected else None, row.change
    return (
        row.artifact,
        row.plan,
        "+".join(f"{count:.3g}" for count in row.evaluations.values()),
        formatting.percent(overhead.defined) if overhead else "",
        formatting.percent(overhead.measured) if overhead else "",
        formatting.value(row.frechet),
        f"{formatting.signed(change)} ({formatting.signed_interval(change)})" if change else "",
        f"{row.psnr.value:.1f} dB" if row.psnr else "",
        row.verdict.kind,
    )


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    cells = [
        cell.rjust(width) if 2 <= column < len(line) - 1 else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
