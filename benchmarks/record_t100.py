"""Measure the larger table of the embedded model, which ships with the package as a recorded result.

    python benchmarks/record_t100.py --work runs/record_t100

Four artifacts under five plans at 100 steps and 1000 images. Every (artifact, plan) is kept in `--work` when
it is done, so a run that was stopped goes on where it was; `--steps` and `--samples` try it out small.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from errata import calibration, compress, deploy
from errata.calibration import CalibrationSet
from errata.correct import IEC, Plan
from errata.correct.costs import Costs, measure_costs
from errata.correct.sampling import FloatSampler, PlanSampler, Sampler, batches_of, default_inputs
from errata.deploy import DeployedPipeline
from errata.embedded import PIPELINE
from errata.report import Reference, Report
from errata.report.assembly import FLOAT_KEY, Key, assemble_rows
from errata.report.measuring import same_steps
from errata.report.provenance import kernels_of, make_protocol, rank_notes, scatter_notes, size_of
from errata.report.recorded import DIGITS_T100
from errata.report.tally import Tally
from errata.report.text import text_table

RECIPES = ("w8a8", "w4a8", "deepcache-10", "w8a8+deepcache-5")
PLANS: Mapping[str, Plan] = {"none": Plan.none()} | {
    steps: Plan(IEC(), steps) for steps in ("ends:1/20", "ends:1/10", "ends:1/4", "all")
}
BATCH_SIZE = 64
CALIBRATION_SAMPLES = 64
CALIBRATION_SEED = 1_000_000  # other noise than the images that are judged
RESAMPLES = 500
# Batches of each plan that are timed against uncorrected batches sampled right after them.
TIMED_BATCHES = 4


def parse_arguments() -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description="Record the larger table of the embedded model.")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is done so far")
    parser.add_argument("--out", type=Path, default=DIGITS_T100, help="report file (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then write the report."""
    options = parse_arguments()
    check_request(options)
    pipe = calibration.load_pipeline(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    artifacts = deploy_all(pipe, options)
    reference = Reference.embedded()
    notes = rank_notes(options.samples, reference)
    float_tally, float_images = measure_float(pipe, artifacts, reference, options)
    tallies: dict[Key, Tally] = {FLOAT_KEY: float_tally}
    plain_seconds: dict[Key, list[float]] = {}
    for artifact, deployed in artifacts.items():
        for plan in PLANS:
            key = (artifact, plan)
            tallies[key], plain_seconds[key] = measure(key, deployed, reference, float_images, options)
    rows = assemble_rows(
        tallies,
        PLANS,
        {name: costs_of(name, deployed, options) for name, deployed in artifacts.items()},
        reference,
        resamples=RESAMPLES,
        seed=options.seed,
        plain_seconds=plain_seconds,
        same_steps=same_steps(artifacts, PLANS),
    )
    report = Report(
        rows=rows,
        protocol=make_protocol(
            next(iter(artifacts.values())),
            reference,
            samples=options.samples,
            seed=options.seed,
            batch_size=BATCH_SIZE,
            image_size=(float_images.shape[2], float_images.shape[3], float_images.shape[1]),
            resamples=RESAMPLES,
            command=" ".join(["python", *sys.argv]),
            notes=notes + scatter_notes(rows),
        ),
        sizes={name: size_of(deployed) for name, deployed in artifacts.items()},
        backends={name: kernels_of(deployed) for name, deployed in artifacts.items()},
    )
    write_text(
        options.out, json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    print(text_table(report))


def check_request(options: argparse.Namespace) -> None:
    """Refuse to go on with the work of another request or another model."""
    options.work.mkdir(parents=True, exist_ok=True)
    weights = calibration.model_fingerprint(calibration.load_pipeline(PIPELINE).unet)
    request = {"steps": options.steps, "samples": options.samples, "seed": options.seed, "weights": weights}
    file = options.work / "request.json"
    if not file.is_file():
        write_text(file, json.dumps(request) + "\n")
    elif json.loads(file.read_text(encoding="utf-8")) != request:
        sys.exit(f"{options.work} holds the work of another request or model; choose another --work")


def deploy_all(pipe: DiffusionPipeline, options: argparse.Namespace) -> dict[str, DeployedPipeline]:
    """Return every artifact, made unless it is there."""
    trajectories = collect(pipe, options)
    for folder in ("compressed", "artifacts"):
        (options.work / folder).mkdir(exist_ok=True)
    for recipe in RECIPES:
        compressed, artifact = options.work / "compressed" / recipe, options.work / "artifacts" / recipe
        if not compressed.is_dir():
            compress.apply(pipe, trajectories, recipe, compressed)
        if not artifact.is_dir():
            deploy.export(compress.load(compressed), artifact)
    return {recipe: deploy.load(options.work / "artifacts" / recipe) for recipe in RECIPES}


def collect(pipe: DiffusionPipeline, options: argparse.Namespace) -> CalibrationSet:
    """Return the trajectories, recorded unless they are there."""
    folder = options.work / "calibration"
    if (folder / "calibration.json").is_file():
        return calibration.load(folder)
    return calibration.collect(
        pipe,
        folder,
        num_inference_steps=options.steps,
        num_samples=CALIBRATION_SAMPLES,
        batch_size=BATCH_SIZE,
        seed=CALIBRATION_SEED + options.seed,
    )


def measure_float(
    pipe: DiffusionPipeline,
    artifacts: Mapping[str, DeployedPipeline],
    reference: Reference,
    options: argparse.Namespace,
) -> tuple[Tally, Tensor]:
    """Return the float model's tally and all its images, (N, C, H, W)."""
    file = cell_file(options, FLOAT_KEY)
    if not file.is_file():
        calls = next(iter(artifacts.values())).schedule.num_steps
        sampler = FloatSampler(
            pipe, num_inference_steps=options.steps, calls=calls, seed=options.seed, inputs=default_inputs
        )
        tally = Tally(shown=options.samples)
        for batch in tqdm(batches_of(options.samples, BATCH_SIZE), desc="float"):
            tally.add(sampler.sample(batch), reference, float_images=None)
        save_arrays(file, tally.arrays())
    tally = Tally.from_arrays(load_arrays(file))
    return tally, tally.shown


def measure(
    key: Key,
    deployed: DeployedPipeline,
    reference: Reference,
    float_images: Tensor,
    options: argparse.Namespace,
) -> tuple[Tally, list[float]]:
    """Return the tally of one plan on one artifact, and seconds of uncorrected runs of its first batches."""
    file = cell_file(options, key)
    if not file.is_file():
        sampler = PlanSampler(deployed, PLANS[key[1]], seed=options.seed, inputs=default_inputs)
        plain: Sampler = PlanSampler(deployed, Plan.none(), seed=options.seed, inputs=default_inputs)
        plain.sample(range(1))  # warm-up
        tally, seconds = Tally(shown=0), []
        for number, batch in enumerate(tqdm(batches_of(options.samples, BATCH_SIZE), desc=" ".join(key))):
            sampled = sampler.sample(batch)
            tally.add(sampled, reference, float_images=float_images[batch.start : batch.stop])
            if number < TIMED_BATCHES:
                seconds.append(sampled.seconds if key[1] == "none" else plain.sample(batch).seconds)
        save_arrays(file, tally.arrays() | {"plain_seconds": np.asarray(seconds)})
    arrays = load_arrays(file)
    return Tally.from_arrays(arrays), arrays["plain_seconds"].tolist()


def costs_of(name: str, deployed: DeployedPipeline, options: argparse.Namespace) -> Costs:
    """Return the measured costs of an artifact's denoiser calls, measured once."""
    file = options.work / f"costs-{name}.json"
    if not file.is_file():
        size = min(BATCH_SIZE, options.samples)
        PlanSampler(deployed, Plan.none(), seed=options.seed, inputs=default_inputs).sample(range(1))
        write_text(file, json.dumps(measure_costs(deployed, batch_size=size)) + "\n")
    costs: Costs = json.loads(file.read_text(encoding="utf-8"))
    return costs


def cell_file(options: argparse.Namespace, key: Key) -> Path:
    """Return the file of one row's tally."""
    name = "-".join(key).replace(":", "_").replace("/", "_")
    return options.work / f"row-{name}.npz"


def save_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """Write the file whole or not at all."""
    staged = file.with_name(f".{file.name}")
    with staged.open("wb") as stream:
        np.savez(stream, **arrays)
    staged.replace(file)


def load_arrays(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file."""
    with np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def write_text(file: Path, text: str) -> None:
    """Write the file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}")
    staged.write_text(text, encoding="utf-8")
    staged.replace(file)


if __name__ == "__main__":
    main()
