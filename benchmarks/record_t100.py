"""Measure the larger table of the embedded model, which the package ships as a recorded result.

    python benchmarks/record_t100.py --work runs/record_t100

Four artifacts under five plans at 100 steps and 1000 images. The same command resumes a run that was stopped;
use `--steps` and `--samples` for a quick trial.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from work_folder import BATCH_SIZE, collect

from errata import calibration, compress, deploy, report
from errata.correct import IEC, Plan
from errata.deploy import DeployedPipeline
from errata.directories import write_whole
from errata.embedded import PIPELINE
from errata.errors import ReportError
from errata.report.bundled_report import DIGITS_T100
from errata.report.report_index import ADVICE

RECIPES = ("w8a8", "w4a8", "deepcache-10", "w8a8+deepcache-5")
PLANS: Mapping[str, Plan] = {"none": Plan.none()} | {
    steps: Plan(IEC(), steps) for steps in ("ends:1/20", "ends:1/10", "ends:1/4", "all")
}
RESAMPLES = 500


def main() -> None:
    """Measure what is missing, then write the report."""
    parser = argparse.ArgumentParser(description="Record the larger table of the embedded model.")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for all results; the same command resumes there"
    )
    parser.add_argument(
        "--out", type=Path, default=DIGITS_T100, help="report file to write (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=100, help="sampling steps (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="images per row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    options = parser.parse_args()
    pipe = calibration.load_pipeline(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    result = report.run(
        deploy_all(pipe, options),
        PLANS,
        report.Reference.embedded(),
        options.work / "report",
        samples=options.samples,
        batch_size=BATCH_SIZE,
        seed=options.seed,
        baseline=pipe,
        resamples=RESAMPLES,
        command=" ".join(["python", *sys.argv]),
        announce=print,
    )
    text = json.dumps(result.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out, (text + "\n").encode(), error=ReportError, advice=ADVICE)
    print(report.text_table(result))


def deploy_all(pipe: DiffusionPipeline, options: argparse.Namespace) -> dict[str, DeployedPipeline]:
    """Return every artifact, made unless it is there."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    trajectories = collect(pipe, options)
    for folder in ("compressed", "artifacts"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    for recipe in RECIPES:
        compressed, artifact = work / "compressed" / recipe, work / "artifacts" / recipe
        if not compressed.is_dir():
            compress.compress(pipe, trajectories, recipe, compressed)
        if not artifact.is_dir():
            deploy.deploy(compress.load(compressed), artifact)
    return {recipe: deploy.load(work / "artifacts" / recipe) for recipe in RECIPES}


if __name__ == "__main__":
    main()
