"""The whole life of a model, on the one inside the package: calibrate, compress, deploy, correct, report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from tqdm import tqdm

import errata
from errata import calibration, compress, deploy, report
from errata.calibration import CalibrationSet
from errata.compress import CompressedPipeline
from errata.correct import IEC, NoGainError, Plan, fit_sheet
from errata.deploy import DeployedPipeline
from errata.directories import refusals_as, staged_directory
from errata.embedded import PIPELINE
from errata.errors import ReportError
from errata.report.bundled_report import recorded_digits
from errata.report.request import PlanOrPlans
from errata.report.store import FOLDER as MEASUREMENTS

# An artifact as it was before outputs were calibrated, which a sheet repairs, and two of today.
OLD = "w8a8:calibrated_output=false"
RECIPES: tuple[str, ...] = (OLD, "w4a8", "w8a8+deepcache-5")
# Two recipes with the same quantizer: codes and ranges of the second are those of the first.
REUSED: Mapping[str, str] = {"w8a8+deepcache-5": OLD}
# The paper's correction. Beside it, each artifact has the plan that errata recommends.
PLANS: Mapping[str, Plan] = {"none": Plan.none(), "iec": Plan(IEC(), "all")}
# Images that a sheet is fitted to, and as many again that judge it.
SHEET_SAMPLES = 32
PAGE = "report.html"
# Says that a directory is a demo's result, which the next demo may replace.
MARKER = "demo.json"
BATCH_SIZE = 64
# Calibration starts from other noise than the images that are compared.
CALIBRATION_SEED = 1_000_000


def run(
    out: str | Path, *, steps: int = 25, samples: int = 256, calibration_samples: int = 64, seed: int = 0
) -> Path:
    """Run everything on the embedded digits model and return the path of the HTML report in `out`.

    `out` ends up with `calibration/`, `compressed/`, `artifacts/`, `sheet.safetensors` and the report's three
    files. An earlier demo's result there is replaced when the new one is complete. Progress goes to stderr.

    Raises:
        ReportError: `out` holds something other than a demo's result, cannot be written, or the extra
            `report` is not installed.
    """
    path = Path(out)
    started = time.monotonic()
    with _fresh_or_replaced(path) as folder:
        pipe = calibration.load_pipeline(PIPELINE)
        pipe.set_progress_bar_config(disable=True)
        trajectories = _calibrate(
            pipe, folder / "calibration", steps=steps, samples=calibration_samples, seed=seed
        )
        artifacts = _deploy_all(pipe, trajectories, folder)
        plans: dict[str, PlanOrPlans] = {**PLANS, **_recommended(artifacts, pipe, folder, seed=seed)}
        result = _report(artifacts, plans, pipe, folder / "report", samples=samples, seed=seed)
        shutil.rmtree(folder / "report" / MEASUREMENTS)  # a demo is never resumed
        for file in (folder / "report").iterdir():
            file.rename(folder / file.name)
        (folder / "report").rmdir()
    _say(f"\n{report.text_table(result)}\n\n{report.free_run_text(result)}\n")
    _say(f"done in {time.monotonic() - started:.0f} s; open {path / PAGE}")
    return path / PAGE


def _recommended(
    artifacts: Mapping[str, DeployedPipeline], pipe: DiffusionPipeline, folder: Path, *, seed: int
) -> dict[str, dict[str, Plan]]:
    """Return the best plan that costs nothing for each artifact that has one; for `OLD` with a sheet."""
    plans: dict[str, dict[str, Plan]] = {}
    for name, deployed in artifacts.items():
        with _stage("choose a plan", name):
            plan = Plan.auto(deployed)
        if name == OLD:
            plan = _with_sheet(deployed, pipe, plan, folder / "sheet.safetensors", seed=seed)
        if not plan.corrects_nothing:
            plans.setdefault("auto + sheet" if name == OLD else "auto", {})[name] = plan
    return plans


def _with_sheet(
    deployed: DeployedPipeline, pipe: DiffusionPipeline, plan: Plan, path: Path, *, seed: int
) -> Plan:
    """Return the plan with a sheet, if one helps."""
    with _stage("repair", "fit an errata sheet"):
        try:
            sheet = fit_sheet(
                deployed, pipe, plan=plan, samples=SHEET_SAMPLES, held_out=SHEET_SAMPLES, seed=seed
            )
        except NoGainError:
            return plan
        sheet.save(path)
    _say(f"    {sheet.summary_text()}")
    return Plan.of_sheet(sheet)


def _report(
    artifacts: Mapping[str, DeployedPipeline],
    plans: Mapping[str, PlanOrPlans],
    pipe: DiffusionPipeline,
    folder: Path,
    *,
    samples: int,
    seed: int,
) -> report.Report:
    with _stage(
        "correct, report", f"{len(plans)} plans on {len(artifacts)} artifacts, {samples} images each"
    ):
        return report.run(
            artifacts,
            plans,
            report.Reference.embedded(),
            folder,
            samples=samples,
            batch_size=BATCH_SIZE,
            seed=seed,
            baseline=pipe,
            recorded=recorded_digits(),
            command="errata demo",
            announce=_say,
        )


def _calibrate(
    pipe: DiffusionPipeline, folder: Path, *, steps: int, samples: int, seed: int
) -> CalibrationSet:
    with _stage("calibrate", f"{samples} trajectories of {steps} steps"):
        return calibration.calibrate(
            pipe,
            folder,
            num_inference_steps=steps,
            num_samples=samples,
            batch_size=min(BATCH_SIZE, samples),
            seed=CALIBRATION_SEED + seed,
        )


def _deploy_all(
    pipe: DiffusionPipeline, trajectories: CalibrationSet, folder: Path
) -> dict[str, DeployedPipeline]:
    for name in ("compressed", "artifacts"):
        (folder / name).mkdir()
    compressed: dict[str, CompressedPipeline] = {}
    deployed: dict[str, DeployedPipeline] = {}
    for recipe in RECIPES:
        name = _folder_name(recipe)
        out, earlier = folder / "compressed" / name, compressed.get(REUSED.get(recipe, ""))
        with _stage("compress", recipe if earlier is None else f"{recipe}, quantizer of {REUSED[recipe]}"):
            compressed[recipe] = compress.compress(pipe, trajectories, recipe, out, reuse=earlier)
        deployed[recipe] = _deploy(compressed[recipe], recipe, folder / "artifacts" / name)
    return deployed


def _folder_name(recipe: str) -> str:
    """Return a name that every file system takes."""
    return recipe.replace(":", ",")


def _deploy(compressed: CompressedPipeline, recipe: str, out: Path) -> DeployedPipeline:
    with _stage("deploy, verify", recipe):
        path = deploy.deploy(compressed, out)
        manifest = deploy.verify(path)
        loaded = deploy.load(path)
    _say(f"    {manifest.summary()}")
    return loaded


@contextmanager
def _stage(name: str, what: str) -> Iterator[None]:
    """Print what was done and how long it took."""
    start = time.monotonic()
    yield
    _say(f"{name:16} {what:55} {time.monotonic() - start:6.1f} s")


def _say(text: str) -> None:
    """Print a line, between progress bars."""
    tqdm.write(text, file=sys.stderr)


@contextmanager
def _fresh_or_replaced(out: Path) -> Iterator[Path]:
    """Yield a directory to fill that becomes `out` on success, in place of an earlier demo's result."""
    replaces = _is_demo(out)
    with refusals_as(ReportError, doing=f"make `{out.parent}`", advice="choose another directory"):
        out.parent.mkdir(parents=True, exist_ok=True)
    with staged_directory(out, error=ReportError, replaces=replaces) as staging:
        yield staging
        marker = {"made_by": f"errata {errata.__version__}", "command": "errata demo"}
        (staging / MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")


def _is_demo(out: Path) -> bool:
    """Return whether a finished demo's result is there.

    Raises:
        ReportError: something else is.
    """
    if (out / MARKER).is_file() and (out / PAGE).is_file():
        return True
    if out.is_dir() and any(out.iterdir()):
        raise ReportError(
            f"`{out}` exists and is not the result of a demo (it has no {MARKER}); choose another directory "
            "or remove it"
        )
    return False
