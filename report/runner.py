"""`run` and `measure`: every plan on every artifact, from equal seeds, compared with one reference.

A report is made in five steps: a `ReportRequest` is validated, its images are sampled and measured batch by
    batch
(`sampling`, `store`), the measurements are summarized (`summarize`) and assembled to rows (`assemble`), and
the rows are rendered (`render`). `run` does all of them, `measure` the first two, `errata.report.merge` the
others.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from diffusers import DiffusionPipeline
from tqdm import tqdm

from errata.correct.sampling import Inputs, batches_of, default_inputs
from errata.deploy import DeployedPipeline
from errata.journal import Journal
from errata.quality.metric import Metric
from errata.quality.reference import Reference
from errata.report.bundled_report import read_report
from errata.report.estimation import DoesNotFitError, forget_unused, promise
from errata.report.first_batch import measure_first_batch
from errata.report.merging import check_output, merge
from errata.report.report_index import ReportIndex, RowSpec
from errata.report.request import PlanOrPlans, ReportRequest, Scorer, batch_names, statistics_digest
from errata.report.results import UNCORRECTED, Report
from errata.report.sampling import BatchSampler, RowSamplers, check_images
from errata.report.sharding import Shard, Workers
from errata.report.store import MeasurementStore, Settings, open_measurements
from errata.report_options import OptionValues, current_options

_log = logging.getLogger(__name__)


def run(
    deployed: DeployedPipeline | Mapping[str, DeployedPipeline],
    plans: Mapping[str, PlanOrPlans],
    reference: Reference,
    out: str | Path,
    *,
    baseline: DiffusionPipeline | None = None,
    inputs: Inputs = default_inputs,
    scorer: Scorer | None = None,
    metrics: Sequence[Metric] = (),
    recorded: Report | None = None,
    command: str = "errata.report.run(…)",
    announce: Callable[[str], None] = _log.info,
    **options: Unpack[OptionValues],
) -> Report:
    """Measure quality, denoiser calls and time of each plan on each artifact, and write the report to `out`.

    `out` gets `report.json` (schema: `errata.report.results`), `report.md`, `report.html` and
    `measurements/`, from which an interrupted run resumes, and which may be removed afterwards. An
    uncorrected run of each artifact is always measured. Processes of `accelerate launch` or `torchrun` share
    the batches; the result is the same.

    Args:
        deployed: an artifact, named by its recipe, or several by name; all with the same number of steps.
        plans: by name; a value may also be a mapping from names of artifacts to plans.
        reference: what images are compared with, and in which features.
        out: a directory that does not exist yet, is empty, or holds measurements with the same settings.
        baseline: the float pipeline that the artifacts were made from, see `ReportRequest`.
        inputs: the pipelines' keyword arguments for a batch of sample indices.
        scorer: models of LPIPS and the CLIP score.
        metrics: metrics of your own.
        recorded: an earlier report to show in a section of its own.
        command: what to run to get this report again, for the page.
        announce: receives what weakens the result, and how long it will take, once that is known.
        options: `samples`, `batch_size`, `seed` and all others of `ReportRequest` that are plain values.

    Raises:
        ReportError: an argument does not fit, `out` is taken, or the extra `report` is not installed.
        PlanError: an artifact cannot serve a plan.
    """
    request = ReportRequest(
        artifacts=deployed,  # type: ignore[arg-type]  # the request names an artifact that comes alone
        plans=plans,
        reference=reference,
        baseline=baseline,
        inputs=inputs,
        scorer=scorer,
        metrics=metrics,
        **current_options(options),
    )
    return run_request(request, out, recorded=recorded, command=command, announce=announce)


def measure(
    deployed: DeployedPipeline | Mapping[str, DeployedPipeline],
    plans: Mapping[str, PlanOrPlans],
    reference: Reference,
    out: str | Path,
    *,
    baseline: DiffusionPipeline | None = None,
    inputs: Inputs = default_inputs,
    scorer: Scorer | None = None,
    metrics: Sequence[Metric] = (),
    shard: Shard | None = None,
    announce: Callable[[str], None] = _log.info,
    **options: Unpack[OptionValues],
) -> Workers:
    """Fill `measurements/` in `out` with the batches of one shard: the first half of `run`.

    Jobs of several shards may share `out`, or have one each, for `merge` to bring together. The first batch
    of every row that was asked for is measured by whichever job comes first; its costs decide which rows are
    added. If jobs share no directory, let one measure it, and copy it to the others.

    Returns:
        The processes that took part, all of which have finished.

    Raises:
        ReportError, PlanError: as `run`.
    """
    request = ReportRequest(
        artifacts=deployed,  # type: ignore[arg-type]  # the request names an artifact that comes alone
        plans=plans,
        reference=reference,
        baseline=baseline,
        inputs=inputs,
        scorer=scorer,
        metrics=metrics,
        **current_options(options),
    )
    return measure_request(request, out, shard=shard, announce=announce)


def run_request(
    request: ReportRequest,
    out: str | Path,
    *,
    recorded: Report | None = None,
    command: str = "errata.report.run(…)",
    announce: Callable[[str], None] = _log.info,
) -> Report:
    """Do what `run` does, for a request."""
    check_output(request.resamples)
    out = Path(out)
    workers = measure_request(request, out, announce=announce)
    if workers.is_first:
        merge(
            [out],
            out,
            resamples=request.resamples,
            metrics=request.metrics,
            recorded=recorded,
            command=command,
        )
    workers.wait()
    return read_report(out)


def measure_request(
    request: ReportRequest,
    out: str | Path,
    *,
    shard: Shard | None = None,
    announce: Callable[[str], None] = _log.info,
) -> Workers:
    """Do what `measure` does, for a request."""
    _tell_notes(request, announce)
    pipes = [artifact.pipe for artifact in request.artifacts.values()]
    check_images(request.reference, request.image_metrics, pipes)
    workers, shard = Workers(on_cpu=request.device.type == "cpu"), shard or Shard()
    try:
        with _measurements(Path(out), _settings(request), workers) as journal:
            _fill(journal, request, workers, shard, announce)
    except DoesNotFitError:
        forget_unused(Path(out))  # which would refuse the smaller batches that the error advises
        raise
    workers.wait()
    return workers


def _fill(
    journal: Journal,
    request: ReportRequest,
    workers: Workers,
    shard: Shard,
    announce: Callable[[str], None],
) -> None:
    """Measure this process's batches; the first process of a job begins with what is done once."""
    batches = batches_of(request.samples, request.batch_size)
    store = MeasurementStore(journal, batches=batches, names=batch_names(request.inputs, batches))
    sampler = _sampler(request, store)
    if workers.is_first:
        with journal.alone():
            measure_first_batch(request, journal.path, store, sampler, announce=announce)
    workers.wait()
    index = ReportIndex.read(journal.path)
    if workers.is_first:
        announce(promise(index, store, shard))
    _sample(index.rows, sampler, workers.batches(shard, len(batches)), batches)


def _tell_notes(request: ReportRequest, announce: Callable[[str], None]) -> None:
    for note in request.notes:
        warnings.warn(note, stacklevel=4)
        announce(note)


def _settings(request: ReportRequest) -> Settings:
    metrics = request.image_metrics
    return Settings(
        seed=request.seed,
        batch_size=request.batch_size,
        network=request.reference.digest,
        reference=statistics_digest(request.reference),
        paired_with=request.fingerprint or UNCORRECTED,
        scores=(*(metric.name for metric in metrics), *(metric.model for metric in metrics if metric.model)),
        shown=request.shown,
    )


def _measurements(out: Path, settings: Settings, workers: Workers) -> Journal:
    """Return the journal of measurements, which the first process of a job begins and all check."""
    if workers.is_first:
        with open_measurements(out, settings):
            pass
    workers.wait()
    return open_measurements(out, settings)


def _sampler(request: ReportRequest, store: MeasurementStore) -> BatchSampler:
    samplers = RowSamplers(request.artifacts, request.baseline, seed=request.seed, inputs=request.inputs)
    return BatchSampler(
        samplers,
        store,
        request.reference,
        metrics=request.image_metrics,
        inputs=request.inputs,
        device=request.device,
        shown=request.shown,
    )


def _sample(
    rows: Sequence[RowSpec], sampler: BatchSampler, mine: Sequence[int], batches: Sequence[range]
) -> None:
    total = len(rows) * sum(len(batches[number]) for number in mine)
    with tqdm(total=total, unit="image", desc="sampling") as bar:

        def advance(count: int) -> None:
            bar.update(count)

        for number in mine:
            sampler.measure(rows, number, done=advance)
