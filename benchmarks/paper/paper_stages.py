"""Calibrate, compress, deploy and report, each kept in a folder and done once for all rows that share it.

    WORK/DATASET-DIGEST/calibration                  one for a model, its sampler and its conditions
    WORK/DATASET-DIGEST/compressed/QUANTIZER/RECIPE  those of one quantizer take its numbers from the first
    WORK/DATASET-DIGEST/artifacts/RECIPE
    WORK/DATASET-DIGEST/reports/RECIPE-DIGEST        all plans of a recipe, from equal noise
    WORK/DATASET-DIGEST/reports/float-DIGEST.json    the float model

A stage that was stopped goes on where it was (calibration, compression) or starts anew (deployment, report).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from errata.correct.sampling import FloatSampler, batches_of
from errata.deploy import DeployedPipeline
from errata.errors import ReportError
from errata.pipelines import ClassConditionalLDMPipeline
from errata.report import Estimate, Reference, Report, bootstrap_interval, frechet_distance, statistics

SCHEDULERS = ("DDIMScheduler", "PNDMScheduler")
RESAMPLES = 200


@dataclass
class Bench:
    """The stages of one model.

    Attributes:
        row: any of its rows; those with the same `key` share everything here but recipe and plan.
        work: folder of everything.
        reference: real images in some features.
        command: how to get the numbers again.
        resamples: of the bootstrap behind each interval.
        device: of the float model and of the artifacts.
    """

    row: Row
    work: Path
    reference: Reference
    command: str
    resamples: int = RESAMPLES
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")

    def __post_init__(self) -> None:
        self.pipe = open_pipeline(self.row).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.conditions: Conditions = conditions_of(self.row, self.pipe)
        self.folder = self.work / f"{self.row.key}-{self.conditions.digest}"
        for name in ("artifacts", "reports"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def calibrated(self) -> CalibrationSet:
        """The trajectories, recorded if they are not there."""
        out, asked = self.folder / "calibration", self.row.calibration
        if (out / "calibration.json").exists():
            return calibration.load(out)
        with stage("calibrate", f"{asked['samples']} trajectories of {self.row.steps} steps"):
            return calibration.collect(
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
            return compress.apply(self.pipe, trajectories, recipe, out, reuse=earlier)

    def deployed(self, recipe: str) -> DeployedPipeline:
        """Its artifact, verified."""
        out = self.folder / "artifacts" / file_name(recipe)
        if not out.exists():
            compressed = self.compressed(recipe)
            with stage("deploy", recipe):
                deploy.export(compressed, out)
        return deploy.load(out, device=self.device)

    def reported(self, recipe: str, rows: Sequence[Row]) -> Report:
        """All plans of these rows, which have that recipe, and a run without correction."""
        plans = {row.plan_name: row.correction() for row in rows if row.plan is not None}
        settings = [self._judged(), {name: plan.to_json() for name, plan in plans.items()}]
        out = self.folder / "reports" / f"{file_name(recipe)}-{digest_of(settings)}"
        if not (out / "report.json").exists():
            deployed = self.deployed(recipe)
            with stage("report", f"{recipe}, {len(plans)} plans, {self.row.samples} images each"):
                return report.run(
                    {recipe: deployed},
                    plans,
                    self.reference,
                    out,
                    samples=self.row.samples,
                    batch_size=self.row.batch_size,
                    seed=self.row.seed,
                    inputs=self.conditions.inputs,
                    resamples=self.resamples,
                    command=self.command,
                )
        return Report.from_json(json.loads((out / "report.json").read_text(encoding="utf-8")))

    def float_distance(self) -> Estimate:
        """Fréchet distance of the float model's images, from the same noise as all others."""
        file = self.folder / "reports" / f"float-{digest_of(self._judged())}.json"
        if not file.exists():
            with stage("report", f"float model, {self.row.samples} images"):
                found = self._measure_float().to_json()
            file.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return Estimate.from_json(json.loads(file.read_text(encoding="utf-8")))

    def _measure_float(self) -> Estimate:
        sampler = FloatSampler(
            self.pipe,
            num_inference_steps=self.row.steps,
            calls=self.row.steps,
            seed=self.row.seed,
            inputs=self.conditions.inputs,
        )
        batches = tqdm(batches_of(self.row.samples, self.row.batch_size), desc="float", disable=None)
        features = torch.cat([self.reference.features(sampler.sample(batch).images) for batch in batches])
        target = self.reference.statistics
        interval = bootstrap_interval(features, target, resamples=self.resamples, seed=self.row.seed)
        return Estimate(frechet_distance(statistics(features), target), interval)

    def _judged(self) -> dict[str, Any]:
        """What a measurement depends on besides the artifact."""
        row, mean = self.row, self.reference.statistics.mean
        return {
            "samples": row.samples,
            "batch_size": row.batch_size,
            "seed": row.seed,
            "resamples": self.resamples,
            "network": self.reference.digest,
            "reference": hashlib.sha256(mean.numpy().tobytes()).hexdigest(),
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
