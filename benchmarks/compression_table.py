"""Measure Fréchet distances of the embedded model by recipe, without IEC and with IEC at every full step.

    python benchmarks/compression_table.py --work runs/compression --samples 256

Finished artifacts and cells of the table stay in `--work`, so the same command resumes a run that was
stopped. `--recipes` and `--steps` make a smaller table. Intervals are paired, at 95 %: all rows start from
the same noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from tally import Tally
from tqdm import tqdm
from work_folder import cell_file, check_request, collect, load_arrays, save_arrays, write_text

from errata import calibration, compress, deploy
from errata.compress import Recipe
from errata.correct import IEC, Plan
from errata.correct.sampling import FloatSampler, PlanSampler, Sampler, batches_of, default_inputs
from errata.embedded import PIPELINE
from errata.quality.intervals import Estimate
from errata.report import Reference
from errata.report.report_index import FLOAT_KEY, Key

BATCH_SIZE = 64
RESAMPLES = 500
INTERVALS = (3, 5, 10, 15)
RECIPES = (
    "w8a8",
    "w4a8",
    "w4a8-learned",
    *(f"deepcache-{n}" for n in INTERVALS),
    *(f"w8a8+deepcache-{n}" for n in INTERVALS),
    *(f"w8a8+cachequant-{n}" for n in INTERVALS),
    *(f"w4a8-learned+deepcache-{n}" for n in INTERVALS),
    *(f"w4a8-learned+cachequant-{n}" for n in INTERVALS),
)
PLANS = {"none": Plan.none(), "iec": Plan(IEC(), "all")}
# Fitted on the states that IEC leaves in the cache; judged with IEC only.
FITTED = ":corrected_by=iec"


def parse_arguments() -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description="Fréchet distances of the embedded model by recipe.")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for all results; the same command resumes there"
    )
    parser.add_argument("--steps", type=int, default=100, help="sampling steps (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="images per row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    parser.add_argument(
        "--recipes", nargs="+", default=list(RECIPES), help="recipes to measure (default: all of the table)"
    )
    parser.add_argument(
        "--pairs", nargs="*", default=[], metavar="A/PLAN=B/PLAN", help="further pairs of rows to compare"
    )
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then print the table."""
    options = parse_arguments()
    check_request(options)
    pipe = calibration.load_pipeline(PIPELINE)
    pipe.set_progress_bar_config(disable=True)
    reference = Reference.embedded()
    tallies = {FLOAT_KEY: measure_float(pipe, reference, options)}
    for recipe in options.recipes:
        for plan in PLANS:
            tallies[recipe, plan] = measure(pipe, (recipe, plan), reference, tallies[FLOAT_KEY], options)
        if "cachequant" in recipe and "corrected_by" not in recipe:
            fitted = recipe + FITTED
            tallies[fitted, "iec"] = measure(pipe, (fitted, "iec"), reference, tallies[FLOAT_KEY], options)
        print(*table_lines(tallies, reference, [recipe]), sep="\n", flush=True)
    lines = table_lines(tallies, reference, options.recipes)
    lines += ["", *pair_lines(tallies, reference, pairs_of(options))]
    write_text(options.work / "table.md", "\n".join(lines) + "\n")
    print(*lines, sep="\n")


def artifact_of(pipe: DiffusionPipeline, recipe: str, options: argparse.Namespace) -> Path:
    """Return the artifact of a recipe, made unless it is there."""
    artifact = folder_of(options, "artifacts", recipe)
    if not artifact.is_dir():
        deploy.deploy(compressed_of(pipe, Recipe.named(recipe), options), artifact)
    return artifact


def compressed_of(
    pipe: DiffusionPipeline, recipe: Recipe, options: argparse.Namespace
) -> compress.CompressedPipeline:
    """Return the compressed pipeline; made unless it is there, in the seconds that `seconds-*.json` tells.

    A quantizer with a cache takes its codes and ranges from the same quantizer without one.
    """
    folder = folder_of(options, "compressed", recipe.name)
    if folder.is_dir():
        return compress.load(folder)
    plain = None
    if recipe.quantization is not None and recipe.cache is not None:
        plain = compressed_of(pipe, Recipe(quantization=recipe.quantization), options)
    start = time.perf_counter()
    compressed = compress.compress(pipe, collect(pipe, options), recipe, folder, reuse=plain)
    write_text(options.work / f"seconds-{folder.name}.json", f"{time.perf_counter() - start:.1f}\n")
    return compressed


def folder_of(options: argparse.Namespace, kind: str, recipe: str) -> Path:
    """Return where an artifact or a compressed pipeline lies."""
    (options.work / kind).mkdir(exist_ok=True)
    folder: Path = options.work / kind / recipe.translate(str.maketrans(":=/", "___"))
    return folder


def measure_float(pipe: DiffusionPipeline, reference: Reference, options: argparse.Namespace) -> Tally:
    """Return the float model's tally, which keeps all its images."""
    file = cell_file(options, FLOAT_KEY)
    if not file.is_file():
        sampler = FloatSampler(
            pipe, num_inference_steps=options.steps, seed=options.seed,
            inputs=default_inputs,
        )  # fmt: skip
        fill(file, sampler, reference, None, options, "float")
    return Tally.from_arrays(load_arrays(file))


def measure(
    pipe: DiffusionPipeline, key: Key, reference: Reference, float_tally: Tally, options: argparse.Namespace
) -> Tally:
    """Return the tally of one plan on one recipe's artifact."""
    file = cell_file(options, key)
    if not file.is_file():
        deployed = deploy.load(artifact_of(pipe, key[0], options))
        sampler = PlanSampler(deployed, PLANS[key[1]], seed=options.seed, inputs=default_inputs)
        fill(file, sampler, reference, float_tally, options, " ".join(key))
    return Tally.from_arrays(load_arrays(file))


def fill(
    file: Path,
    sampler: Sampler,
    reference: Reference,
    float_tally: Tally | None,
    options: argparse.Namespace,
    name: str,
) -> None:
    """Sample every batch and write the tally to a file."""
    tally = Tally(shown=options.samples if float_tally is None else 0)
    for batch in tqdm(batches_of(options.samples, BATCH_SIZE), desc=name, disable=None):
        wanted = None if float_tally is None else float_tally.shown[batch.start : batch.stop]
        tally.add(sampler.sample(batch), reference, float_images=wanted)
    save_arrays(file, tally.arrays())


def table_lines(tallies: dict[Key, Tally], reference: Reference, recipes: Sequence[str]) -> list[str]:
    """Return the table as Markdown."""
    target = reference.statistics
    lines = [
        "| recipe | none | change from float | PSNR | IEC | IEC − none | IEC, fitted for it | fitted − not |",
        "|---|---|---|---|---|---|---|---|",
    ]
    float_tally = tallies[FLOAT_KEY]
    lines.append(f"| float | {fd(float_tally, target)} | | | | | | |")
    for recipe in recipes:
        none, iec = tallies[recipe, "none"], tallies[recipe, "iec"]
        cells = [
            fd(none, target),
            change(none, float_tally, target),
            psnr(none),
            fd(iec, target),
            change(iec, none, target),
        ]
        fitted = tallies.get((recipe + FITTED, "iec"))
        cells += ["", ""] if fitted is None else [fd(fitted, target), change(fitted, iec, target)]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return lines


def pairs_of(options: argparse.Namespace) -> list[tuple[Key, Key]]:
    """Return the comparisons across recipes that the question of the table asks for."""
    pairs: list[tuple[Key, Key]] = [(("w4a8-learned", "none"), ("w4a8", "none"))]
    for bits in ("w8a8", "w4a8-learned"):
        for n in INTERVALS:
            for plan in PLANS:
                pairs.append(((f"{bits}+cachequant-{n}", plan), (f"{bits}+deepcache-{n}", plan)))
    for text in options.pairs:
        left, _, right = text.partition("=")
        a, b = left.rpartition("/"), right.rpartition("/")
        pairs.append(((a[0], a[2]), (b[0], b[2])))
    return pairs


def pair_lines(
    tallies: dict[Key, Tally], reference: Reference, pairs: Sequence[tuple[Key, Key]]
) -> list[str]:
    """Return the paired differences of those pairs that were measured."""
    return [
        f"- {' '.join(a)} − {' '.join(b)}: FD {change(tallies[a], tallies[b], reference.statistics)}, "
        f"PSNR {psnr_change(tallies[a], tallies[b])} dB"
        for a, b in pairs
        if a in tallies and b in tallies
    ]


def fd(tally: Tally, target: Any) -> str:
    """Return a distance as text."""
    return f"{tally.frechet(target, resamples=2, seed=0).value:.2f}"


def psnr(tally: Tally) -> str:
    """Return the mean PSNR to the float model's images as text."""
    mean = tally.mean_psnr
    return "" if mean is None else f"{mean.value:.1f}"


def psnr_change(tally: Tally, other: Tally) -> str:
    """Return a paired difference of mean PSNR with its interval as text."""
    return signed(tally.psnr_change_from(other))


def change(tally: Tally, other: Tally, target: Any) -> str:
    """Return a paired difference with its interval as text."""
    return signed(tally.change_from(other, target, resamples=RESAMPLES, seed=0))


def signed(estimate: Estimate | None) -> str:
    """Return a difference with its interval as text."""
    assert estimate is not None  # every row but the float model's has its PSNR
    low, high = estimate.interval.low, estimate.interval.high
    return f"{estimate.value:+.2f} ({low:+.2f} to {high:+.2f})"


if __name__ == "__main__":
    main()
