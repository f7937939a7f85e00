"""Measure calibrated outputs and errata sheets: PSNR to the float model's images, in pairs.

    python benchmarks/sheets.py --work runs/sheets --steps 50
    python benchmarks/sheets.py --work runs/sheets --steps 50 --distances 1000 --recipes w4a8
    python benchmarks/sheets.py --work runs/horses --steps 50 --pipeline runs/horses-model

Each artifact is measured under several plans: without a calibrated output and without a sheet, with a sheet
that the float model taught, with one that its own full calls taught if it has a cache, and in its calibrated
form. Each sheet is fitted under its plan. Fits, and the
choice within a fit, see other noise than the images that are measured. "change" is the mean of the paired
differences to the same plan without a sheet, with its 95 % interval. With `--distances` there is also the
Fréchet distance in digit features. Artifacts and sheets stay in `--work`, and are not made again.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from work_folder import recorded

from errata import calibration, compress, correct, deploy
from errata.correct import IEC, Forecast, Hindsight, NoGainError, Plan, Sheet
from errata.correct.sampling import FloatSampler, PlanSampler, Sampler, batches_of, default_inputs
from errata.deploy import DeployedPipeline
from errata.embedded import PIPELINE
from errata.machine import describe_machine
from errata.quality import frechet_distance, statistics
from errata.quality.intervals import mean_estimate
from errata.quality.paired import psnr
from errata.quality.reference import Reference

RECIPES = (
    "w8a8",
    "w4a8",
    "w4a8-learned",
    "deepcache-10",
    "w8a8+deepcache-10",
    "w8a8+deepcache-10:branch=1",
    "w8a8+cachequant-10",
)
BATCH_SIZE = 32
# Seeds of the images that are measured, and of those that calibrate; a fit has seeds of its own.
MEASURED, CALIBRATED = 10_000_000, 1_000_000


def plans_for(deployed: DeployedPipeline, wanted: Sequence[str] | None) -> dict[str, Plan]:
    """Return the plans to measure, by name; those that are wanted, or all."""
    plans = {"none": Plan.none(), "iec": Plan(IEC())}
    if deployed.schedule.has_cache:
        plans = cached_plans()
        if wanted is None or "auto" in wanted:
            plans["auto"] = Plan.auto(deployed)
    return {name: plan for name, plan in plans.items() if wanted is None or name in wanted}


def cached_plans() -> dict[str, Plan]:
    """Return the plans for artifacts with a cache."""
    forecast = Plan(Forecast())
    return {
        "none": Plan.none(),
        "forecast": forecast,
        "forecast+hindsight": forecast + Plan(Hindsight()),
        "forecast+hindsight 0.5": forecast + Plan(Hindsight(gain=0.5)),
        "forecast+iec": forecast + Plan(IEC(), steps="full"),
    }


def artifact_for(pipe: DiffusionPipeline, options: argparse.Namespace, recipe: str) -> DeployedPipeline:
    """Return the artifact of a recipe, made once."""
    root = options.work / f"steps-{options.steps}"
    root.mkdir(parents=True, exist_ok=True)
    name = recipe.replace(":", "_").replace(",", "_")
    if not (root / name).exists():
        given = recorded(
            pipe,
            root / "calibration",
            steps=options.steps,
            samples=64,
            batch_size=BATCH_SIZE,
            seed=CALIBRATED,
        )
        compressed = compress.compress(pipe, given, recipe, root / f"{name}.compressed")
        deploy.deploy(compressed, root / name)
    return deploy.load(root / name)


def sheet_for(
    deployed: DeployedPipeline,
    teacher: DiffusionPipeline | Literal["self"],
    plan: Plan,
    path: Path,
) -> Sheet | None:
    """Return the sheet for a plan, fitted once; None if it does not help."""
    if path.exists():
        return Sheet.load(path, deployed)
    if path.with_suffix(".none").exists():
        return None
    try:
        sheet = correct.fit_sheet(deployed, teacher, plan=plan, progress=False)
    except NoGainError as problem:
        path.with_suffix(".none").write_text(f"{problem}\n")
        return None
    sheet.save(path)
    return sheet


def sampled(sampler: Sampler, count: int) -> Tensor:
    """Return so many images, `(N, C, H, W)`."""
    return torch.cat([sampler.sample(batch).images for batch in batches_of(count, BATCH_SIZE)])


def distance(images: Tensor, reference: Reference) -> float:
    """Return the Fréchet distance of images `(N, C, H, W)` to real ones."""
    with torch.inference_mode():
        return frechet_distance(statistics(reference.network(images)), reference.statistics)


class Table:
    """The rows of one recipe."""

    def __init__(self, recipe: str, options: argparse.Namespace, floats: Tensor) -> None:
        self._name, self._options, self._floats = recipe, options, floats
        self._reference = Reference.embedded() if options.distances else None

    def row(self, name: str, deployed: DeployedPipeline, plan: Plan, plain: Tensor | None = None) -> Tensor:
        """Measure and print a plan; return the PSNR of each image."""
        count = max(self._options.samples, self._options.distances)
        sampler = PlanSampler(deployed, plan, seed=MEASURED, inputs=default_inputs)
        images = sampled(sampler, count)
        values = psnr(images[: self._options.samples], self._floats[: self._options.samples])
        text = f"{self._name:28} {name:34} {float(values.mean()):6.2f} dB"
        if plain is not None:
            change = mean_estimate(values - plain)
            text += f"  {change.value:+5.2f} ({change.interval.low:+.2f} to {change.interval.high:+.2f})"
        if self._reference is not None:
            text += f"  FD {distance(images, self._reference):.3f}"
        print(text, flush=True)
        return values


def main() -> None:
    """Run the benchmark."""
    options = parsed()
    warnings.filterwarnings("ignore", message="this sheet was fitted")
    pipe, floats = opened(options, options.pipeline)
    for recipe in options.recipes:
        measure(pipe, recipe, options, floats)


def opened(options: argparse.Namespace, pipeline: Path) -> tuple[DiffusionPipeline, Tensor]:
    """Return the float pipeline and its images, `(N, C, H, W)`; say on what machine, and their distance."""
    torch.set_num_threads(options.threads)
    pipe = calibration.load_pipeline(pipeline)
    pipe.set_progress_bar_config(disable=True)
    print(f"{describe_machine()}; {options.steps} steps, {options.samples} images, seed {MEASURED}")
    sampler = FloatSampler(pipe, num_inference_steps=options.steps, seed=MEASURED, inputs=default_inputs)
    distances = getattr(options, "distances", 0)
    floats = sampled(sampler, max(options.samples, distances))
    if distances:
        print(f"float model: FD {distance(floats, Reference.embedded()):.3f}")
    return pipe, floats


def uncalibrated(recipe: str) -> str:
    """Return the name of a recipe without a calibrated output."""
    return f"{recipe}{',' if ':' in recipe else ':'}calibrated_output=false"


def measure(pipe: DiffusionPipeline, recipe: str, options: argparse.Namespace, floats: Tensor) -> None:
    """Print all rows of a recipe."""
    deployed = artifact_for(pipe, options, uncalibrated(recipe))
    calibrated = artifact_for(pipe, options, recipe) if deployed.manifest.is_quantized else None
    table = Table(recipe, options, floats)
    root = options.work / f"steps-{options.steps}" / "sheets"
    root.mkdir(exist_ok=True)
    known: Mapping[str, DiffusionPipeline | Literal["self"]] = {"float": pipe, "self": "self"}
    names = options.teachers if deployed.schedule.has_cache else set(options.teachers) - {"self"}
    teachers = {name: known[name] for name in names}
    for name, plan in plans_for(deployed, options.plans).items():
        plain = table.row(name, deployed, plan)
        if calibrated is not None:
            its_plan = Plan.auto(calibrated) if name == "auto" else plan  # bound to one artifact
            table.row(f"{name}, calibrated output", calibrated, its_plan, plain)
        for taught, teacher in teachers.items():
            file = root / f"{deployed.manifest.sha256[:12]}-{name.replace(' ', '-')}-{taught}.safetensors"
            sheet = sheet_for(deployed, teacher, plan, file)
            if sheet is None:
                print(f"{recipe:28} {name + ', sheet ' + taught:34} does not help", flush=True)
            else:
                table.row(f"{name}, sheet {taught}", deployed, Plan(sheet) + plan, plain)


def common_parser(description: str | None, *, steps: int, recipes: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark of artifacts against the float model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for artifacts and sheets")
    parser.add_argument("--pipeline", type=Path, default=PIPELINE, help="the float pipeline")
    parser.add_argument("--steps", type=int, default=steps, help="sampling steps")
    parser.add_argument("--samples", type=int, default=64, help="images whose PSNR is measured")
    parser.add_argument("--recipes", nargs="*", default=list(recipes), help="artifacts to measure")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser


def add_distances(parser: argparse.ArgumentParser) -> None:
    """Declare how many images a Fréchet distance is measured on."""
    parser.add_argument("--distances", type=int, default=0, help="images of a Fréchet distance; 0: none")


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = common_parser(__doc__, steps=50, recipes=RECIPES)
    add_distances(parser)
    parser.add_argument("--plans", nargs="+", default=None, help="plans to measure, by name (default: all)")
    parser.add_argument(
        "--teachers", nargs="*", choices=("float", "self"), default=("float", "self"), help="of the sheets"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
