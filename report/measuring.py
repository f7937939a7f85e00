"""`run`, `measure`, `merge`: every plan on every artifact, from equal seeds, against one reference."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from diffusers import DiffusionPipeline
from tqdm import tqdm

from errata.calibration import model_fingerprint
from errata.correct import Plan, wrap
from errata.correct.sampling import Inputs, batches_of, default_inputs
from errata.deploy import DeployedPipeline
from errata.directories import refuse_taken
from errata.errors import ReportError
from errata.quality.reference import Reference
from errata.report.beginning import Asked, begin
from errata.report.drawing import require_matplotlib
from errata.report.grid import RowSpec, check_names
from errata.report.judging import Judge
from errata.report.ledger import Ledger, Target
from errata.report.locking import locked
from errata.report.markdown import markdown
from errata.report.measurements import SHOWN, Measurements, write_whole
from errata.report.page import Strips, html, require_jinja2
from errata.report.probing import check_network
from errata.report.provenance import rank_notes, scatter_notes
from errata.report.results import FLOAT, Report
from errata.report.rows import assemble_rows, costs_of, judged_rows
from errata.report.sampling import BatchSampler, RowSamplers
from errata.report.scoring import Scorer
from errata.report.settings import (
    FOLDER,
    Settings,
    batch_names,
    check_same,
    open_folder,
    read_settings,
    statistics_digest,
)
from errata.report.shares import Shard, Workers
from errata.report.strips import strip

_log = logging.getLogger(__name__)

UNCORRECTED = "uncorrected"


def run(
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
    resamples: int = 200,
    shown: int = 16,
    recorded: Report | None = None,
    command: str = "errata.report.run(…)",
    announce: Callable[[str], None] = _log.info,
) -> Report:
    """Measures quality, denoiser calls and time of each plan on each artifact; writes the report to `out`.

    `out` gets `report.json` (schema: `errata.report.results`), `report.md` and `report.html`, and
    `measurements/`, from which a run that was stopped goes on, and which may be removed afterwards. Image i
    starts from `seed + i` in every row. An uncorrected run of each artifact is always measured. Started by
    `accelerate launch` or `torchrun`, the processes share the batches, and the result is the same.

    Args:
        deployed: an artifact, named by its recipe, or several by name; all with the same number of steps.
        plans: by name.
        reference: what images are compared with, and in which features.
        out: a directory that does not exist yet, is empty, or holds measurements with the same settings.
        samples: images per row; at least 2.
        batch_size: images per batch; each batch is run under all plans in turn, so that their times compare.
        baseline: the float pipeline that the artifacts came from, with the recorded scheduler; adds its row,
            distances of single images, and how errors grow along a run. It must be the very model that the
            artifacts were made from. Without it, images are compared with the same artifact's uncorrected.
        seed: of image 0.
        inputs: the pipelines' keyword arguments for a batch of sample indices.
        scorer: what is measured of single images beside PSNR and SSIM: LPIPS, a CLIP score.
        equal_compute: whether to add, for every plan that costs something, rows of what else the same compute
            buys, see `errata.report.equal_compute`.
        amplification: denoiser calls, such as "0,12,24", at which to measure how much a step amplifies an
            error; None measures it nowhere. Each takes hundreds of evaluations.
        resamples: bootstrap resamples per interval.
        shown: how many seeds the page shows.
        recorded: an earlier report to show in a section of its own.
        command: what to run to get this report again, for the page.
        announce: hears how much there is to do, once that is known.

    Raises:
        ReportError: an argument does not fit, `out` is taken, or the extra `report` is not installed.
        PlanError: an artifact cannot serve a plan.
    """
    _check_resamples(resamples)
    require_jinja2()
    require_matplotlib()
    out = Path(out)
    workers = measure(
        deployed,
        plans,
        reference,
        out,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        baseline=baseline,
        inputs=inputs,
        scorer=scorer,
        equal_compute=equal_compute,
        amplification=amplification,
        shown=shown,
        announce=announce,
    )
    if workers.is_first:
        merge([out], out, resamples=resamples, recorded=recorded, command=command)
    workers.wait()
    return read_report(out)


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
    artifacts = _named(deployed)
    _check(artifacts, samples=samples, batch_size=batch_size, shown=shown)
    plans = with_uncorrected(plans)
    check_names(plans)
    fingerprint = None if baseline is None else _fingerprint(artifacts, baseline)
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
    _check_resamples(resamples)
    require_jinja2()
    require_matplotlib()
    if not sources:
        raise ReportError("there is nothing to merge; give the --out of one run or more")
    folders = [Path(source) / FOLDER for source in sources]
    ledger = _common_ledger(folders)
    measurements = Measurements(folders, batches=ledger.ranges, names=ledger.batch_names)
    _require_all(ledger.rows, measurements)
    place = Path(out)
    if place.resolve() not in [Path(source).resolve() for source in sources]:
        refuse_taken(place, error=ReportError)
    judge = Judge(measurements, Target.read(folders[0]), resamples=resamples, seed=ledger.protocol.seed)
    report = _report(ledger, judge, resamples, command)
    strips = {
        row.key: strip(measurements.all_of(row.directory, SHOWN) / 255)
        for row in ledger.rows
        if measurements.shows(row.directory)
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


def with_uncorrected(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """The plans, the one that corrects nothing first; it is added if it is not there.

    Raises:
        ReportError: several plans that correct nothing, or one that corrects is called "none".
    """
    plain = {name: plan for name, plan in plans.items() if plan.corrects_nothing}
    if len(plain) > 1:
        raise ReportError(f"plans {sorted(plain)} all correct nothing; keep one")
    if not plain and "none" in plans:
        steps = " + ".join(steps for _, steps in plans["none"].parts)
        raise ReportError(f'plan "none" corrects steps {steps!r}; give it another name')
    return {**(plain or {"none": Plan.none()}), **plans}


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


def _common_ledger(folders: Sequence[Path]) -> Ledger:
    first, *others = folders
    settings, ledger = read_settings(first), Ledger.read(first)
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


def _named(deployed: DeployedPipeline | Mapping[str, DeployedPipeline]) -> dict[str, DeployedPipeline]:
    if isinstance(deployed, DeployedPipeline):
        return {deployed.manifest.recipe.name: deployed}
    if not isinstance(deployed, Mapping):
        raise TypeError(
            f"report.run takes what deploy.load(path) returns, or a mapping of names to that; got a "
            f"{type(deployed).__name__}"
        )
    return dict(deployed)


def _check_resamples(resamples: int) -> None:
    if resamples < 2:
        raise ReportError(f"resamples={resamples}; it must be at least 2")


def _check(artifacts: Mapping[str, DeployedPipeline], *, samples: int, batch_size: int, shown: int) -> None:
    for name, value, least in (("samples", samples, 2), ("batch_size", batch_size, 1), ("shown", shown, 0)):
        if value < least:
            raise ReportError(f"{name}={value}; it must be at least {least}")
    if not artifacts:
        raise ReportError("there is no artifact to report on; pass at least one")
    if FLOAT in artifacts:
        raise ReportError(f"an artifact is called {FLOAT!r}, which names the float model's row; rename it")
    steps = {name: artifact.num_inference_steps for name, artifact in artifacts.items()}
    if len(set(steps.values())) > 1:
        raise ReportError(
            f"the artifacts have different numbers of steps, {steps}; report on them one by one"
        )


def _fingerprint(artifacts: Mapping[str, DeployedPipeline], baseline: DiffusionPipeline) -> str:
    found: str = model_fingerprint(baseline.unet)
    for name, artifact in artifacts.items():
        expected = artifact.manifest.calibration["fingerprint"]
        if found != expected:
            raise ReportError(
                f"artifact {name!r} was made from another model than the baseline (fingerprint "
                f"{expected[:12]}…, the baseline has {found[:12]}…); pass the pipeline that was compressed, "
                "or leave the baseline out"
            )
    return found


def _write(report: Report, strips: Strips, folder: Path, *, recorded: Report | None) -> None:
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(folder / "report.md", markdown(report).encode())
    write_whole(folder / "report.html", html(report, strips, recorded=recorded).encode())
    write_whole(folder / "report.json", (text + "\n").encode())
