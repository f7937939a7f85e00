"""Measure corrections of a model that is sampled with guidance: correct classes, Fréchet distance, PSNR.

    OMP_NUM_THREADS=1 python benchmarks/guided_corrections.py --work runs/guided --threads 1

Trains a small class-conditional model of scikit-learn's 8x8 digits (0.7 million parameters, minutes on a CPU;
one label in ten is dropped, for classifier-free guidance), makes artifacts of it for each guidance scale, and
samples each under every plan from equal noise. An image is right if the digit classifier of `errata.embedded`
recognizes the requested class; the classifier and the Fréchet distance see the images enlarged to 16x16, like
the real ones. Differences are paired, against no correction on the same artifact; intervals are at 95 %.

The model and finished artifacts and cells of the table stay in `--work`, so the same command resumes a run
that was stopped. `--recipes`, `--scales` and `--plans` make a smaller table.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compression_table import signed
from guided_model import RESOLUTION, artifact_of, images_of, labels_of, load_float, train_model
from tally import Tally
from torch import Tensor
from tqdm import tqdm
from work_folder import load_arrays, save_arrays, write_text

from errata import correct, deploy
from errata.correct import IEC, DiffIER, EpsilonScaling, Langevin, Plan
from errata.correct.sampling import Sampled, batches_of, generators_of
from errata.embedded import load_features
from errata.machine import describe_machine, versions
from errata.quality import Estimate, Reference, mean_estimate

FLOAT = "float"
# The gradient of a loss that is the mean over the pixels, not their sum, is so much smaller. Eight iterations
# of it shrink ε as much as the scaling that follows it in the table, and add a little noise.
MEAN_STEP_SIZE = DiffIER().step_size / RESOLUTION**2
PLANS = {
    "none": Plan.none(),
    "IEC": Plan(IEC(), "all"),
    "DiffIER": Plan(DiffIER(), "all"),
    "DiffIER, first 3 steps": Plan(DiffIER(), "first:3"),
    "DiffIER, last 3 steps": Plan(DiffIER(), "last:3"),
    "DiffIER, 1 iteration": Plan(DiffIER(max_iterations=1), "all"),
    "DiffIER, gradient of the mean": Plan(DiffIER(step_size=MEAN_STEP_SIZE), "all"),
    "EpsilonScaling, as strong": Plan(
        EpsilonScaling(scale=(1 - 2 * MEAN_STEP_SIZE) ** -DiffIER().max_iterations), "all"
    ),
    "Langevin": Plan(Langevin(), "all"),
    "Langevin, snr 0.05": Plan(Langevin(snr=0.05), "all"),
}
BATCH_SIZE = 128
RESAMPLES = 500

Cell = tuple[float, str, str]
"""Guidance scale, recipe and plan; the float model has no plan but "none"."""


def parse_arguments() -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description="Corrections of a model that is sampled with guidance.")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for all results; the same command resumes there"
    )
    parser.add_argument("--steps", type=int, default=30, help="sampling steps (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=512, help="images per row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    parser.add_argument(
        "--training-steps", type=int, default=3000, help="training steps of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads; use 1 on a busy machine (default: %(default)s)"
    )
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.5, 4.0], help="guidance scales (default: %(default)s)"
    )
    parser.add_argument(
        "--recipes", nargs="+", default=["w8a8", "w4a8"], help="recipes to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--plans", nargs="+", default=list(PLANS), choices=list(PLANS), help="plans to measure (default: all)"
    )
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then print the table."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    check_request(options)
    train_model(options)
    reference = Reference.embedded()
    tallies: dict[Cell, Tally] = {}
    for recipe in options.recipes:
        for scale in options.scales:
            cell = (scale, FLOAT, "none")
            tallies[cell] = measure(cell, reference, None, options)
            for plan in dict.fromkeys(["none", *options.plans]):
                tallies[scale, recipe, plan] = measure(
                    (scale, recipe, plan), reference, tallies[cell].shown, options
                )
    cells = sorted(tallies, key=functools.partial(order, options))
    rows = [row_of(cell, tallies, reference) for cell in cells]
    protocol = protocol_of(options, reference)
    stored = {"protocol": protocol, "rows": rows}
    write_text(options.work / "table.json", json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    text = "\n".join([*table_lines(rows), "", *(f"- {name}: {value}" for name, value in protocol.items())])
    write_text(options.work / "table.md", text + "\n")
    print(text)


def check_request(options: argparse.Namespace) -> None:
    """Refuse to go on with the work of another request."""
    names = ("steps", "samples", "seed", "training_steps")
    request = {name: getattr(options, name) for name in names}
    file = options.work / "request.json"
    if not file.is_file():
        write_text(file, json.dumps(request) + "\n")
    elif json.loads(file.read_text(encoding="utf-8")) != request:
        sys.exit(f"{options.work} holds the work of another request; choose another --work")


def measure(
    cell: Cell, reference: Reference, float_images: Tensor | None, options: argparse.Namespace
) -> Tally:
    """Return the tally of a cell, sampled unless it is there; the float model's keeps all its images."""
    scale, recipe, plan = cell
    name = "".join(letter if letter.isalnum() else "_" for letter in f"{recipe} {plan}")
    file = options.work / f"guidance-{scale:g}" / "cells" / f"{name}.npz"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        tally = Tally(shown=0 if recipe != FLOAT else options.samples)
        sample = sampler_of(cell, options)
        for batch in tqdm(batches_of(options.samples, BATCH_SIZE), desc=f"{scale:g} {recipe} {plan}"):
            wanted = None if float_images is None else float_images[batch.start : batch.stop]
            tally.add(sample(batch), reference, float_images=wanted)
        save_arrays(file, tally.arrays())
    return Tally.from_arrays(load_arrays(file))


def sampler_of(cell: Cell, options: argparse.Namespace) -> Callable[[range], Sampled]:
    """Return a function that samples the images of some indices; image i depends on `seed + i` alone."""
    scale, recipe, plan = cell
    run: Any
    if recipe == FLOAT:
        run = functools.partial(load_float(options), num_inference_steps=options.steps)
    else:
        deployed = deploy.load(artifact_of(scale, recipe, options))
        deployed.pipe.set_progress_bar_config(disable=True)
        run = correct.wrap(deployed, PLANS[plan])

    def sample(indices: range) -> Sampled:
        start = time.perf_counter()
        pixels = run(
            class_labels=labels_of(indices),
            guidance_scale=scale,
            generator=generators_of(indices, options.seed),
            output_type="latent",
        ).images
        seconds = time.perf_counter() - start
        images = images_of(pixels)
        if recipe == FLOAT:
            return Sampled(images=images, seconds=seconds, base={"full": float(options.steps)}, extra={})
        return Sampled(images=images, seconds=seconds, base=run.stats.base, extra=run.stats.extra)

    return sample


def hits(tally: Tally) -> Tensor:
    """Return which images are of the class that was asked for, (N,), float64."""
    scores = load_features().head(tally.features.float())
    return (scores.argmax(dim=1) == torch.tensor(labels_of(range(tally.samples)))).double()


def row_of(cell: Cell, tallies: dict[Cell, Tally], reference: Reference) -> dict[str, Any]:
    """Return what a cell measured, as plain values; changes are from no correction on the same artifact."""
    scale, recipe, plan = cell
    tally, plain, target = tallies[cell], tallies[scale, recipe, "none"], reference.statistics
    calls = tally.evaluations["full"] / plain.evaluations["full"]
    row: dict[str, Any] = {"guidance": scale, "recipe": recipe, "plan": plan, "calls": calls}
    measured: dict[str, Estimate | None] = {
        "accuracy": mean_estimate(100 * hits(tally)),
        "frechet": tally.frechet(target, resamples=RESAMPLES, seed=0),
        "psnr": tally.mean_psnr,
    }
    if plan != "none":
        measured |= {
            "accuracy_change": mean_estimate(100 * (hits(tally) - hits(plain))),
            "frechet_change": tally.change_from(plain, target, resamples=RESAMPLES, seed=0),
            "psnr_change": tally.psnr_change_from(plain),
        }
    elif recipe != FLOAT:
        original = tallies[scale, FLOAT, "none"]
        measured["accuracy_change_from_float"] = mean_estimate(100 * (hits(tally) - hits(original)))
        measured["frechet_change_from_float"] = tally.change_from(
            original, target, resamples=RESAMPLES, seed=0
        )
    return row | {name: value.to_json() for name, value in measured.items() if value is not None}


def order(options: argparse.Namespace, cell: Cell) -> tuple[float, int, int]:
    """Return where a cell stands in the table."""
    scale, recipe, plan = cell
    return scale, [FLOAT, *options.recipes].index(recipe), list(PLANS).index(plan)


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table as Markdown."""
    lines = [
        "| guidance | artifact | plan | calls | right, % | change | distance | change | PSNR, dB | change |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['guidance']:g}", row["recipe"], row["plan"], f"{row['calls']:.2f}"]
        for name, digits in (("accuracy", 1), ("frechet", 2), ("psnr", 1)):
            cells.append(f"{row[name]['value']:.{digits}f}" if name in row else "")
            change = row.get(f"{name}_change")
            cells.append("" if change is None else signed(Estimate.from_json(change)))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def protocol_of(options: argparse.Namespace, reference: Reference) -> dict[str, Any]:
    """Return what was measured, on what and how."""
    return {
        "steps": options.steps,
        "samples": options.samples,
        "seed": options.seed,
        "training": json.loads((options.work / "training.json").read_text(encoding="utf-8")),
        "reference": reference.source,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
