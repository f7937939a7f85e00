"""`merge`: measurements that are complete become a report; no model is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.directories import check_is_vacant
from errata.errors import ReportError
from errata.report.drawing import require_matplotlib
from errata.report.grid import RowSpec
from errata.report.judging import Judge
from errata.report.ledger import Ledger, Target
from errata.report.markdown import markdown
from errata.report.measurements import SHOWN, Measurements, write_whole
from errata.report.page import Strips, html, require_jinja2
from errata.report.provenance import scatter_notes
from errata.report.results import Report
from errata.report.rows import assemble_rows, costs_of, judged_rows
from errata.report.settings import FOLDER, check_same, read_settings
from errata.report.strips import strip


def merge(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    resamples: int = 200,
    recorded: Report | None = None,
    command: str | None = None,
) -> Report:
    """The second half of `run`: a report of measurements that are complete; no model is needed.

    Args:
        sources: directories that `measure` or `run` filled; what one lacks may lie in another.
        out: one of them, or a new directory.
        resamples: bootstrap resamples per interval.
        recorded: an earlier report to show in a section of its own.
        command: what to run to get this report again.

    Raises:
        ReportError: measurements are missing or damaged, or do not belong together; or `out` is taken.
    """
    check_output(resamples)
    if not sources:
        raise ReportError("there is nothing to merge; give the --out of one run or more")
    folders = [Path(source) / FOLDER for source in sources]
    settings = read_settings(folders[0])
    ledger = _common_ledger(folders, settings)
    measurements = Measurements(folders, batches=ledger.ranges, names=ledger.batch_names)
    _require_all(ledger.rows, measurements)
    place = Path(out)
    if place.resolve() not in [Path(source).resolve() for source in sources]:
        check_is_vacant(place, error=ReportError)
    judge = Judge(measurements, Target.read(folders[0]), resamples=resamples, seed=ledger.protocol.seed)
    report = _report(ledger, judge, resamples, command)
    strips = {
        row.key: strip(measurements.all_of(row.directory, SHOWN, most=settings["shown"]) / 255)
        for row in ledger.rows
        if settings["shown"]
    }
    _write(report, strips, place, recorded=recorded)
    return report


def read_report(out: str | Path) -> Report:
    """The report that lies in `out`.

    Raises:
        ReportError: there is none, or it is damaged.
    """
    file = Path(out) / "report.json"
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as problem:
        raise ReportError(f"`{file}` cannot be read as a report: {problem}") from problem
    return Report.from_json(value)


def check_output(resamples: int) -> None:
    """Refuse, before the work that it would end, a report that cannot be made.

    Raises:
        ReportError: too few resamples, or the extra `report` is not installed.
    """
    if resamples < 2:
        raise ReportError(f"resamples={resamples}; it must be at least 2")
    require_jinja2()
    require_matplotlib()


def _report(ledger: Ledger, judge: Judge, resamples: int, command: str | None) -> Report:
    judged = judged_rows(ledger, judge)
    rows = assemble_rows(judged, ledger, dimension=ledger.protocol.feature_dimension)
    protocol = ledger.protocol.finished(
        resamples=resamples,
        promised_seconds=ledger.promised_seconds,
        command=command,
        notes=scatter_notes(rows),
        sampling_seconds=sum(each.facts.took for each in judged.values()),
    )
    return Report(
        rows=rows,
        protocol=protocol,
        sizes=ledger.sizes,
        backends=ledger.backends,
        costs=costs_of(judged),
        growth=ledger.growth,
    )


def _common_ledger(folders: Sequence[Path], settings: Mapping[str, Any]) -> Ledger:
    first, *others = folders
    ledger = Ledger.read(first)
    for folder in others:
        check_same(read_settings(folder), settings, folder)
        if not Ledger.read(folder).agrees_with(ledger):
            raise ReportError(
                f"`{folder}` and `{first}` measured other rows: each job found out by itself what else the "
                "same compute buys; let one job measure its first batch, copy its directory to the others, "
                "and run them again"
            )
    return ledger


def _require_all(rows: Sequence[RowSpec], measurements: Measurements) -> None:
    missing = sorted({batch for row in rows for batch in measurements.missing(row.directory)})
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise ReportError(
            f"{len(missing)} of {len(measurements.batches)} batches are not complete (numbers {shown}, from "
            "0); run the same command again to go on, or the shards that lack: with --shard I/N, batch b "
            "belongs to shard b mod N"
        )


def _write(report: Report, strips: Strips, folder: Path, *, recorded: Report | None) -> None:
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "report.md", markdown(report).encode())
    write_whole(folder / "report.html", html(report, strips, recorded=recorded).encode())
    write_whole(folder / "report.json", (text + "\n").encode())
