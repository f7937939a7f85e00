"""The first thing that a report says: what each artifact does at no extra compute.

Of the plans that cost next to nothing, the best one that was measured to help is taken, else none. It helps
if the distance falls, or if it may have stayed the same and the images come closer to the float model's.
Paired 95 % intervals decide both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.quality import formatting
from errata.report.results import Report, Row
from errata.report.tables import headline_metric

TITLE = "At no extra compute"
# Extra compute, as a fraction, that counts as none.
_NEXT_TO_NOTHING = 0.01


@dataclass(frozen=True, kw_only=True)
class FreeRun:
    """The float model, or the best run of an artifact at no extra compute.

    Attributes:
        row: the run.
        size: its weights as a fraction of the float32 weights, or None.
        speed: compute of the float model per image, divided by that of this run, or None.
    """

    row: Row
    size: float | None
    speed: float | None

    @property
    def plan(self) -> str:
        """Name of its plan; empty where nothing is corrected."""
        return self.row.plan if self.row.is_corrected else ""


def free_runs(report: Report) -> list[FreeRun]:
    """Return the float model's run, if it was measured, and one for each artifact, in order."""
    best = [_best(report.of(artifact)) for artifact in report.artifacts]
    rows = [report.float_row, *best]
    return [_free_run(report, row) for row in rows if row is not None]


def free_run_lines(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return a table of texts, its header and its lines, without the columns that nothing is known of."""
    header = (
        "artifact",
        "plan",
        "weights vs float32",
        "speed vs float",
        headline_metric().title,
        "PSNR to float",
    )
    lines = [_texts(run) for run in free_runs(report)]
    known = [column for column in range(len(header)) if any(line[column] for line in lines)]
    return _columns(header, known), [_columns(line, known) for line in lines]


def _best(rows: Sequence[Row]) -> Row | None:
    """Return the best of an artifact's rows, see the module."""
    plain = next((row for row in rows if row.verdict.kind == "uncorrected"), None)
    helping = [row for row in rows if _is_free(row) and _helps(row)]
    return min(helping, key=lambda row: row.frechet.value, default=plain)


def _is_free(row: Row) -> bool:
    return row.is_corrected and row.overhead is not None and row.overhead.defined <= _NEXT_TO_NOTHING


def _helps(row: Row) -> bool:
    assert row.change is not None
    if row.change.interval.excludes_zero:
        return row.change.value < 0
    return row.psnr_change is not None and row.psnr_change.interval.low > 0


def _free_run(report: Report, row: Row) -> FreeRun:
    size, right = report.sizes.get(row.artifact), report.float_row
    is_timed = right is not None and right.compute > 0 and row.compute > 0
    return FreeRun(
        row=row,
        size=1.0 if row.is_float else None if size is None else size.ratio,
        speed=right.compute / row.compute if right is not None and is_timed else None,
    )


def _texts(run: FreeRun) -> tuple[str, ...]:
    distance, psnr = run.row.frechet, run.row.psnr
    return (
        "float model" if run.row.is_float else run.row.artifact,
        run.plan,
        "" if run.size is None else f"{run.size:.2f} ×",
        "" if run.speed is None else f"{run.speed:.1f} ×",
        f"{formatting.value(distance)} ({formatting.interval(distance)})",
        "" if psnr is None else f"{psnr.value:.1f} dB",
    )


def _columns(line: Sequence[str], chosen: Sequence[int]) -> tuple[str, ...]:
    return tuple(line[column] for column in chosen)
