"""`measure`: fills a folder of measurements, all of it or the share of one of many jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from diffusers import DiffusionPipeline
from tqdm import tqdm

from errata.correct import Plan, wrap
from errata.correct.sampling import Inputs, batches_of, default_inputs
from errata.deploy import DeployedPipeline
from errata.quality.reference import Reference
from errata.report.asking import check_sizes, fingerprint_of, named, with_uncorrected
from errata.report.beginning import Asked, begin
from errata.report.grid import RowSpec, check_names
from errata.report.ledger import Ledger
from errata.report.locking import locked
from errata.report.measurements import Measurements
from errata.report.probing import check_network
from errata.report.provenance import rank_notes
from errata.report.sampling import BatchSampler, RowSamplers
from errata.report.scoring import Scorer
from errata.report.settings import (
    Settings,
    batch_names,
    open_folder,
    statistics_digest,
)
from errata.report.shares import Shard, Workers

_log = logging.getLogger(__name__)

UNCORRECTED = "uncorrected"


def measure(
    deployed: DeployedPipeline | Mapping[str, DeployedPipeline],
    plans: Mapping[str, Plan],
    reference: Reference,
    out: str | Path,
    *,
    samples: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    baseline: DiffusionPipeline | None = None,
    inputs: Inputs = default_inputs,
    scorer: Scorer | None = None,
    equal_compute: bool = True,
    amplification: str | None = None,
    shown: int = 16,
    shard: Shard | None = None,
    announce: Callable[[str], None] = _log.info,
) -> Workers:
    """The first half of `run`: fills `measurements/` in `out`, with the batches of one shard.

    Jobs of several shards may share `out`, or have one each, for `merge` to bring together. The first batch
    of every row that was asked for is measured by whichever job comes first: its costs decide which rows are
    added. Where jobs share no directory, let one measure it, and copy it to the others.

    Returns:
        The processes that took part, all of which have finished.

    Raises:
        ReportError, PlanError: as `run`.
    """
    artifacts = named(deployed)
    check_sizes(artifacts, samples=samples, batch_size=batch_size, shown=shown)
    plans = with_uncorrected(plans)
    check_names(plans)
    fingerprint = None if baseline is None else fingerprint_of(artifacts, baseline)
    for artifact in artifacts.values():
        for plan in plans.values():
            wrap(artifact, plan)  # refuses what cannot be served
    check_network(reference, [artifact.pipe for artifact in artifacts.values()])
    notes = rank_notes(samples, reference)
    for note in notes:
        announce(note)
    asked = Asked(
        artifacts=artifacts,
        plans=plans,
        reference=reference,
        baseline=baseline,
        fingerprint=fingerprint,
        inputs=inputs,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        equal_compute=equal_compute,
        notes=notes,
        amplification=amplification,
    )
    settings = Settings(
        seed=seed,
        batch_size=batch_size,
        network=reference.digest,
        reference=statistics_digest(reference.statistics),
        paired_with=fingerprint or UNCORRECTED,
        scores=(scorer or Scorer()).names,
        shown=shown,
    )
    device = next(iter(artifacts.values())).pipe.device
    workers = Workers(on_cpu=device.type == "cpu")
    if workers.is_first:
        open_folder(Path(out), settings)
    workers.wait()
    folder = open_folder(Path(out), settings)
    batches = batches_of(samples, batch_size)
    measurements = Measurements([folder], batches=batches, names=batch_names(inputs, batches))
    samplers = RowSamplers(artifacts, baseline, seed=seed, inputs=inputs)
    sampler = BatchSampler(
        samplers,
        measurements,
        reference,
        scorer=scorer or Scorer(),
        inputs=inputs,
        device=device,
        shown=shown,
    )
    if workers.is_first:
        with locked(folder):
            begin(asked, folder, measurements, samplers, sampler)
    workers.wait()
    ledger = Ledger.read(folder)
    if workers.is_first:
        announce(_promise(ledger, shard or Shard()))
    _sample(ledger.rows, sampler, workers.batches(shard or Shard(), len(batches)), batches)
    workers.wait()
    return workers


def _sample(
    rows: Sequence[RowSpec], sampler: BatchSampler, mine: Sequence[int], batches: Sequence[range]
) -> None:
    total = len(rows) * sum(len(batches[number]) for number in mine)
    with tqdm(total=total, unit="image", desc="sampling") as bar:
        for number in mine:
            sampler.measure(rows, number, done=lambda count: _advance(bar, count))


def _advance(bar: tqdm[NoReturn], count: int) -> None:
    bar.update(count)


def _promise(ledger: Ledger, shard: Shard) -> str:
    seconds = ledger.promised_seconds / shard.count
    span = (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else (f"{seconds / 3600:.1f} h")
    )
    share = f", of which shard {shard} does its part" if shard.count > 1 else ""
    return (
        f"{len(ledger.rows)} rows of {sum(ledger.batches)} images{share}: about {span} of denoiser calls, in "
        "one process"
    )
