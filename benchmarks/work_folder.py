"""Keep the work of a benchmark in a folder: request, recordings, arrays and texts, written atomically."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from errata import calibration
from errata.calibration import CalibrationSet
from errata.embedded import PIPELINE
from errata.report.report_index import Key

BATCH_SIZE = 64
CALIBRATION_SAMPLES = 64
CALIBRATION_SEED = 1_000_000  # other noise than the images that are judged


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


def collect(pipe: DiffusionPipeline, options: argparse.Namespace) -> CalibrationSet:
    """Return the trajectories of `--work`, recorded unless they are there."""
    return recorded(
        pipe,
        options.work / "calibration",
        steps=options.steps,
        samples=CALIBRATION_SAMPLES,
        batch_size=BATCH_SIZE,
        seed=CALIBRATION_SEED + options.seed,
    )


def recorded(
    pipe: DiffusionPipeline,
    folder: Path,
    *,
    steps: int,
    samples: int,
    batch_size: int,
    seed: int,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    guidance_scale: float | None = None,
) -> CalibrationSet:
    """Return the trajectories in a folder, recorded there first if it has none."""
    if (folder / "calibration.json").is_file():
        return calibration.load(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return calibration.calibrate(
        pipe,
        folder,
        num_inference_steps=steps,
        num_samples=samples,
        batch_size=batch_size,
        seed=seed,
        inputs=inputs,
        guidance_scale=guidance_scale,
    )


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
