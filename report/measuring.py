"""`measure`: fills a folder of measurements, all of it or the share of one of many jobs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from diffusers import DiffusionPipeline
from tqdm import tqdm

from errata.correct import Plan
from errata.correct.sampling import Inputs, batches_of, default_inputs
from errata.deploy import DeployedPipeline
from errata.durations import duration
from errata.quality.reference import Reference
from errata.report.asking import Asked, ask
from errata.report.beginning import begin
from errata.report.grid import RowSpec
from errata.report.ledger import Ledger
from errata.report.locking import locked
from errata.report.measurements import Measurements
from errata.report.probing import check_images
from errata.report.results import UNCORRECTED
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
    scorer = scorer or Scorer()
    asked = ask(
        deployed,
        plans,
        reference,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        baseline=baseline,
        inputs=inputs,
        equal_compute=equal_compute,
        amplification=amplification,
        shown=shown,
        announce=announce,
    )
    check_images(reference, scorer, [artifact.pipe for artifact in asked.artifacts.values()])
    workers, shard = Workers(on_cpu=asked.device.type == "cpu"), shard or Shard()
    folder = _folder(Path(out), _settings(asked, scorer, shown), workers)
    batches = batches_of(samples, batch_size)
    measurements = Measurements([folder], batches=batches, names=batch_names(inputs, batches))
    samplers = RowSamplers(asked.artifacts, baseline, seed=seed, inputs=inputs)
    sampler = BatchSampler(
        samplers,
        measurements,
        reference,
        scorer=scorer,
        inputs=inputs,
        device=asked.device,
        shown=shown,
    )
    if workers.is_first:
        with locked(folder):
            begin(asked, folder, measurements, samplers, sampler, facts=scorer.facts)
    workers.wait()
    ledger = Ledger.read(folder)
    if workers.is_first:
        announce(_promise(ledger, shard))
    _sample(ledger.rows, sampler, workers.batches(shard, len(batches)), batches)
    workers.wait()
    return workers


def _settings(asked: Asked, scorer: Scorer, shown: int) -> Settings:
    return Settings(
        seed=asked.seed,
        batch_size=asked.batch_size,
        network=asked.reference.digest,
        reference=statistics_digest(asked.reference.statistics),
        paired_with=asked.fingerprint or UNCORRECTED,
        scores=(*scorer.names, *scorer.facts.values()),
        shown=shown,
    )


def _folder(out: Path, settings: Settings, workers: Workers) -> Path:
    """Made by the first process, looked into by all."""
    if workers.is_first:
        open_folder(out, settings)
    workers.wait()
    return open_folder(out, settings)


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
    share = f", of which shard {shard} does its part" if shard.count > 1 else ""
    return (
        f"{len(ledger.rows)} rows of {sum(ledger.batches)} images{share}: about {duration(seconds)} of "
        "denoiser calls, in one process"
    )
