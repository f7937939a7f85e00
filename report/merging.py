"""`merge`: complete measurements become a report; no model is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.directories import check_is_vacant, refusals_as, write_whole
from errata.errors import ReportError
from errata.journal_rules import check_same_request
from errata.quality.metric import Metric
from errata.report.assemble import assemble_rows, costs_of, scatter_notes, summarize_rows
from errata.report.drawing import check_matplotlib
from errata.report.image_grid import Strips, strip
from errata.report.render import check_jinja2, html, markdown
from errata.report.report_index import ADVICE, ReportIndex, RowSpec, Target
from errata.report.results import Report
from errata.report.store import FOLDER, RULES, SHOWN, MeasurementStore, read_settings
from errata.report.summarize import RowSummarizer


def merge(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    resamples: int = 200,
    metrics: Sequence[Metric] = (),
    recorded: Report | None = None,
    command: str | None = None,
) -> Report:
    """Make a report of measurements that are complete, the second half of `run`; no model is needed.

    Args:
        sources: directories that `measure` or `run` filled; a batch that one lacks may lie in another.
        out: one of them, or a new directory.
        resamples: bootstrap resamples per interval.
        metrics: metrics of your own that the measurements were made with.
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
    index = _common_index(folders, settings)
    _check_metrics(index, metrics)
    store = MeasurementStore(folders, batches=index.ranges, names=index.batch_names)
    _check_complete(index.rows, store)
    if Path(out).resolve() not in [Path(source).resolve() for source in sources]:
        check_is_vacant(Path(out), error=ReportError)
    summarizer = RowSummarizer(
        store,
        Target.read(folders[0]),
        resamples=resamples,
        seed=index.protocol.seed,
        metrics=[metric for metric in metrics if not metric.is_per_image],
    )
    report = _report(index, summarizer, resamples, command)
    _write(report, _strips(index, store, settings["shown"]), Path(out), recorded=recorded)
    return report


def check_output(resamples: int) -> None:
    """Check, before any work, that the report can be made in the end.

    Raises:
        ReportError: too few resamples, or the extra `report` is not installed.
    """
    if resamples < 2:
        raise ReportError(f"resamples={resamples}; it must be at least 2")
    check_jinja2()
    check_matplotlib()


def _report(index: ReportIndex, summarizer: RowSummarizer, resamples: int, command: str | None) -> Report:
    summaries = summarize_rows(index, summarizer)
    rows = assemble_rows(summaries, index, dimension=index.protocol.feature_dimension)
    protocol = index.protocol.finished(
        resamples=resamples,
        promised_seconds=index.promised_seconds,
        command=command,
        notes=scatter_notes(rows),
        sampling_seconds=sum(each.facts.took for each in summaries.values()),
    )
    return Report(
        rows=rows,
        protocol=protocol,
        sizes=index.sizes,
        backends=index.backends,
        costs=costs_of(summaries),
        growth=index.growth,
        own_metrics=index.metrics,
    )


def _common_index(folders: Sequence[Path], settings: Mapping[str, Any]) -> ReportIndex:
    first, *others = folders
    index = ReportIndex.read(first)
    for folder in others:
        check_same_request(read_settings(folder), settings, folder, RULES)
        if not ReportIndex.read(folder).agrees_with(index):
            raise ReportError(
                f"`{folder}` and `{first}` measured different rows: each job chose compute-matched "
                "alternatives by its own costs. Let one job measure its first batch, copy its directory to "
                "the others, and run them again"
            )
    return index


def _check_metrics(index: ReportIndex, metrics: Sequence[Metric]) -> None:
    given = {metric.name for metric in metrics}
    missing = [each.name for each in index.metrics if not each.is_per_image and each.name not in given]
    if missing:
        raise ReportError(
            f"the measurements were made for the metrics {', '.join(missing)}, computed while "
            "merging; give them again: --metric package.module:attribute, in Python metrics=[…]"
        )


def _check_complete(rows: Sequence[RowSpec], store: MeasurementStore) -> None:
    missing = sorted({batch for row in rows for batch in store.missing(row.directory)})
    if missing:
        shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        raise ReportError(
            f"{len(missing)} of {len(store.batches)} batches are not complete (numbers {shown}, from 0); run "
            "the same command again to resume, or the shards of the missing batches: with --shard I/N, batch "
            "b belongs to shard b mod N"
        )


def _strips(index: ReportIndex, store: MeasurementStore, shown: int) -> Strips:
    rows = index.rows if shown else ()
    return {row.key: strip(store.all_of(row.directory, SHOWN, most=shown) / 255) for row in rows}


def _write(report: Report, strips: Strips, folder: Path, *, recorded: Report | None) -> None:
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    files = {
        "report.md": markdown(report),
        "report.html": html(report, strips, recorded=recorded),
        "report.json": text + "\n",
    }
    with refusals_as(ReportError, doing=f"make `{folder}`", advice=ADVICE):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content.encode(), error=ReportError, advice=ADVICE)
