"""Calibrate, compress, deploy and report, each kept in a folder and done once for all rows that share it.

    WORK/DATASET-DIGEST/calibration                  one for a model, its sampler and its conditions
    WORK/DATASET-DIGEST/compressed/QUANTIZER/RECIPE  those of one quantizer take its numbers from the first
    WORK/DATASET-DIGEST/artifacts/RECIPE
    WORK/DATASET-DIGEST/reports/RECIPE-DIGEST        the plans of a recipe, from equal noise, and their report
    WORK/DATASET-DIGEST/reports/RECIPE-DIGEST.json   the report of one set of plans
    WORK/DATASET-DIGEST/reports/float-DIGEST         the float model
    WORK/DATASET-DIGEST/reports/float-DIGEST.json

A stage that was stopped goes on where it was, except for deployment, which takes seconds. Where
plans are added to those of a recipe, only they are measured; the others are in its folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from paper_conditions import Conditions, conditions_of
from paper_rows import Row, digest_of
from tqdm import tqdm

from errata import calibration, compress, deploy, report
from errata.calibration import CalibrationSet
from errata.compress import CompressedPipeline
from errata.correct.sampling import batches_of
from errata.deploy import DeployedPipeline
from errata.directories import write_whole
from errata.errors import ReportError
from errata.journal import Journal
from errata.pipelines import ClassConditionalLDMPipeline
from errata.quality import Estimate, Reference
from errata.quality.clip_score import ClipScore
from errata.report import Report, Scorer
from errata.report.report_index import ADVICE, Target, float_row
from errata.report.request import batch_names, chosen_metrics, statistics_digest
from errata.report.sampling import BatchSampler, RowSamplers
from errata.report.store import FOLDER, RULES, MeasurementStore
from errata.report.summarize import RowSummarizer

SCHEDULERS = ("DDIMScheduler", "PNDMScheduler")
RESAMPLES = 200


def default_device() -> str:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class FloatModel:
    """What was measured of the float model's images: the Fréchet distance, and the rest by name."""

    frechet: Estimate
    metrics: Mapping[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        metrics = {name: value.to_json() for name, value in self.metrics.items()}
        return {"frechet": self.frechet.to_json(), "metrics": metrics}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> FloatModel:
        """Inverse of `to_json`."""
        metrics = {name: Estimate.from_json(each) for name, each in value["metrics"].items()}
        return cls(frechet=Estimate.from_json(value["frechet"]), metrics=metrics)


@dataclass
class Bench:
    """The stages of one model.

    Attributes:
        row: any of its rows; those with the same `key` share everything here but recipe and plan.
        work: folder of everything.
        reference: real images in some features.
        command: how to get the numbers again.
        resamples: of the bootstrap behind each interval.
        equal_compute: whether reports also measure what else the compute of a correction buys.
        device: of the float model, the artifacts and the CLIP.
    """

    row: Row
    work: Path
    reference: Reference
    command: str
    resamples: int = RESAMPLES
    equal_compute: bool = False
    device: str = field(default_factory=default_device)

    def __post_init__(self) -> None:
        self.pipe = open_pipeline(self.row).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.conditions: Conditions = conditions_of(self.row, self.pipe)
        self.folder = self.work / f"{self.row.key}-{self.conditions.digest}"
        self._loaded: Scorer | None = None
        for name in ("artifacts", "reports"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def calibrated(self) -> CalibrationSet:
        """The trajectories, recorded if they are not there."""
        out, asked = self.folder / "calibration", self.row.calibration
        if (out / "calibration.json").exists():
            return calibration.load(out)
        with stage("calibrate", f"{asked['samples']} trajectories of {self.row.steps} steps"):
            return calibration.calibrate(
                self.pipe,
                out,
                num_inference_steps=self.row.steps,
                num_samples=asked["samples"],
                batch_size=asked["batch_size"],
                seed=asked["seed"],
                **self.conditions.calibration(samples=asked["samples"], batch_size=asked["batch_size"]),
            )

    def compressed(self, recipe: str) -> CompressedPipeline:
        """That recipe, with the numbers of an earlier one if both have the same quantizer."""
        quantization = compress.Recipe.named(recipe).quantization
        quantizer = "float" if quantization is None else digest_of(quantization.to_json())
        folder = self.folder / "compressed" / quantizer
        out = folder / file_name(recipe)
        if out.exists():
            return compress.load(out)
        folder.mkdir(parents=True, exist_ok=True)
        trajectories, earlier = self.calibrated(), None
        if quantization is not None:
            finished = (other for other in sorted(folder.iterdir()) if is_finished(other))
            earlier = next(map(compress.load, finished), None)
        with stage("compress", recipe):
            return compress.compress(self.pipe, trajectories, recipe, out, reuse=earlier)

    def deployed(self, recipe: str) -> DeployedPipeline:
        """Its artifact, verified."""
        out = self.folder / "artifacts" / file_name(recipe)
        if not out.exists():
            compressed = self.compressed(recipe)
            with stage("deploy", recipe):
                deploy.deploy(compressed, out)
        return deploy.load(out, device=self.device)

    def reported(self, recipe: str, rows: Sequence[Row]) -> Report:
        """All plans of these rows, which have that recipe, and a run without correction."""
        plans = {row.plan_name: row.correction() for row in rows if row.plan is not None}
        asked = {name: plan.to_json() for name, plan in plans.items()}
        out = self._reports / f"{file_name(recipe)}-{digest_of(self._measured())}"
        told = digest_of([self._measured(), asked, self.resamples, self.equal_compute])
        file = self._reports / f"{file_name(recipe)}-{told}.json"
        if not file.exists():
            deployed = self.deployed(recipe)
            with stage("report", f"{recipe}, {len(plans)} plans, {self.row.samples} images each"):
                report.run(
                    {recipe: deployed},
                    plans,
                    self.reference,
                    out,
                    samples=self.row.samples,
                    batch_size=self.row.batch_size,
                    seed=self.row.seed,
                    inputs=self.conditions.inputs,
                    scorer=self._scorer(),
                    compute_matched=self.equal_compute,
                    resamples=self.resamples,
                    command=self.command,
                )
            write_whole(file, (out / "report.json").read_bytes(), error=ReportError, advice=ADVICE)
        return Report.from_json(json.loads(file.read_bytes()))

    def float_model(self) -> FloatModel:
        """The float model's images, from the same noise as all others."""
        out = self._reports / f"float-{digest_of(self._measured())}"
        file = self._reports / f"float-{digest_of([self._measured(), self.resamples])}.json"
        if not file.exists():
            with (
                stage("report", f"float model, {self.row.samples} images"),
                Journal(out / FOLDER, self._measured(), RULES) as journal,
            ):
                found = self._measure_float(journal).to_json()
            write_whole(file, json.dumps(found).encode() + b"\n", error=ReportError, advice=ADVICE)
        return FloatModel.from_json(json.loads(file.read_bytes()))

    def _measure_float(self, journal: Journal) -> FloatModel:
        """As a report measures a row, without an artifact; goes on with what the journal holds."""
        row, inputs = self.row, self.conditions.inputs
        batches = batches_of(row.samples, row.batch_size)
        store = MeasurementStore(journal, batches=batches, names=batch_names(inputs, batches))
        sampler = BatchSampler(
            RowSamplers({}, self.pipe, seed=row.seed, inputs=inputs),
            store,
            self.reference,
            metrics=[metric for metric in chosen_metrics(self._scorer()) if metric.is_per_image],
            inputs=inputs,
            device=torch.device(self.device),
            shown=0,
        )
        fingerprint = calibration.model_fingerprint(self.pipe.unet)
        spec = float_row(fingerprint, row.steps, device=self.device, recorded_steps=row.steps)
        for number in tqdm(range(len(batches)), desc="float", disable=None):
            sampler.measure([spec], number)
        target = Target.of(self.reference)
        summary = RowSummarizer(store, target, resamples=self.resamples, seed=row.seed).of(spec)
        return FloatModel(frechet=summary.frechet.estimate(), metrics=summary.metrics)

    def _scorer(self) -> Scorer:
        """With the row's CLIP, which is loaded once, when it is needed."""
        if self._loaded is None:
            clip = None if self.row.clip is None else ClipScore(self.row.clip, device=self.device)
            self._loaded = Scorer(clip=clip)
        return self._loaded

    @property
    def _reports(self) -> Path:
        return self.folder / "reports"

    def _measured(self) -> dict[str, Any]:
        """What measurements depend on besides the artifact and its plans."""
        row = self.row
        return {
            "samples": row.samples,
            "batch_size": row.batch_size,
            "seed": row.seed,
            "network": self.reference.digest,
            "reference": statistics_digest(self.reference),
            "clip": row.clip,
        }


def open_pipeline(row: Row) -> DiffusionPipeline:
    """The float pipeline with the row's scheduler.

    Raises:
        CalibrationError: it cannot be opened.
        ReportError: its class is none that the row's can be made of, or the scheduler is unknown.
    """
    pipe = calibration.load_pipeline(row.pipeline)
    settings = dict(row.scheduler)
    name = settings.pop("class", None)
    if name not in SCHEDULERS:
        raise ReportError(f"`{row.name}`: scheduler {name!r} is unknown; allowed are {', '.join(SCHEDULERS)}")
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    found = type(pipe).__name__
    if found == row.pipeline_class:
        pipe.register_modules(scheduler=scheduler)
        return pipe
    made = _CONVERSIONS.get((found, row.pipeline_class))
    if made is None:
        raise ReportError(
            f"`{row.pipeline}` is a {found}; `{row.name}` needs a {row.pipeline_class}; choose another "
            "--pipeline"
        )
    return made(pipe, scheduler)


def _ddim(pipe: Any, scheduler: Any) -> DiffusionPipeline:
    return DDIMPipeline(unet=pipe.unet, scheduler=scheduler)


def _latent(pipe: Any, scheduler: Any) -> DiffusionPipeline:
    return ClassConditionalLDMPipeline(pipe.vqvae, pipe.unet, scheduler)


# Pipelines of the same networks: only the loop is another.
_CONVERSIONS: dict[tuple[str, str], Callable[[Any, Any], DiffusionPipeline]] = {
    ("DDPMPipeline", "DDIMPipeline"): _ddim,
    ("LDMPipeline", "ClassConditionalLDMPipeline"): _latent,
}


def is_finished(folder: Path) -> bool:
    """Whether it is a result, and not the work of a run that was stopped."""
    return folder.is_dir() and not folder.name.startswith(".") and folder.suffix != ".partial"


def file_name(recipe: str) -> str:
    """A recipe's name as that of a folder."""
    return recipe.replace(":", "_").replace("/", "-")


@contextmanager
def stage(name: str, what: str) -> Iterator[None]:
    """Says on stderr what was done and how long it took."""
    start = time.monotonic()
    yield
    tqdm.write(f"{name:10} {what:70} {time.monotonic() - start:8.1f} s", file=sys.stderr)
