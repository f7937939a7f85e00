"""`errata compress`: quantize a pipeline and add a cache, or show what that would do."""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.compress_options import (
    add_inputs,
    add_modes,
    add_recipe_options,
    check_options,
    range_samples,
    recipe_from,
)
from errata.cli.conditions import (
    SOURCES_TOLD,
    check_conditions,
    inputs_of_batches,
    read_conditions,
)
from errata.cli.output import announce, emit, estimate_text, exceptions_text, megabytes, schedule_text, table
from errata.cli.usage import Commands, UsageError, add_command, add_preset_option, positive
from errata.errors import RecipeError
from errata.memory import peak_cuda_memory, peak_memory

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from errata.calibration import CalibrationSet
    from errata.compress import CompressedPipeline, Recipe
    from errata.compress.jobs.dry_run import LayerDryRun, Preview
    from errata.compress.jobs.progress import BlockReport
    from errata.compress.quantize.sensitivity_table import SensitivityTable
    from errata.estimates import Estimate

DETAILS = f"""\
Recipes:
  w8a8, w4a8             bits of weights and activations; weights are rounded to nearest
  w8a8-learned,
  w4a8-learned           the rounding of the weights is learned, block by block
  deepcache-N            every N-th step runs in full, the others reuse its deep feature
  deepcache:steps=0/4/9  the same, with full steps of your choice
  cachequant-N           one step in N runs in full, placed by a search; reused features are corrected
Join a quantizer and a cache with `+`. Options follow a colon: w8a8+deepcache-10:branch=1. A recipe may also
be a .json or .yaml file. docs/compress.md lists all options.

Before it begins, it says what that will take in time, disk space and memory, from a call of the network,
and refuses what cannot fit.

Finished work is kept in DIR.partial until DIR is complete. To resume an interrupted run, give the same
command again. DIR must be new or empty.

  errata compress google/ddpm-cifar10-32 --calibration runs/cifar/calibration \\
      --recipe w4a8-learned+cachequant-5 --out runs/cifar/compressed
  errata compress google/ddpm-cifar10-32 --calibration runs/cifar/calibration --recipe w4a8 --dry-run

{SOURCES_TOLD}
"""
SENSITIVITY_SAMPLES = 16


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "compress",
        summary="quantize a calibrated pipeline and add a cache",
        details=DETAILS,
    )
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="the pipeline that was calibrated: hub name or local folder"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="DIR",
        help="what `errata calibrate` wrote",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new directory; with --sensitivity a new .json or .csv file",
    )
    parser.add_argument(
        "--range-samples",
        type=positive,
        metavar="N",
        help="number of trajectories from which activation ranges are chosen, at most (default: 64)",
    )
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="DIR",
        help="reuse codes and ranges of an earlier result with the same model, calibration and quantizer",
    )
    add_preset_option(
        parser,
        sets="ranges from 16 trajectories, learned rounding on 128 inputs, 8 of them a step",
    )
    add_recipe_options(parser)
    add_inputs(parser)
    add_modes(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_options(args)
    recipe = recipe_from(args)

    from errata import calibration

    if args.out is not None and not args.sensitivity:
        _check_is_vacant(args.out)
    recording = calibration.load(args.calibration)
    if args.dry_run:
        return _dry_run(args, recording, recipe)
    if args.sensitivity:
        return _sensitivity(args, recording, recipe)
    return _compress(args, recording, recipe)


def _check_is_vacant(out: Path) -> None:
    from errata.compress.jobs.stages import remove_leftovers
    from errata.directories import check_is_vacant
    from errata.errors import RecipeError

    remove_leftovers(out)
    check_is_vacant(out, error=RecipeError)


def _compress(args: argparse.Namespace, recording: "CalibrationSet", recipe: "Recipe") -> int:
    from errata import calibration, compress

    if args.range_samples is not None and recipe.quantization is None:
        raise UsageError(
            f"--range-samples has no effect with the recipe {recipe.name}, which quantizes nothing; "
            "leave it out"
        )
    samples = recording.num_samples
    conditions = read_conditions(args, samples, told=f"the calibration set `{args.calibration}`")
    blocks: list[BlockReport] = []
    start = time.monotonic()
    pipe = calibration.load_pipeline(args.pipeline)
    check_conditions(pipe, args, conditions, is_complete=False)
    estimate = _estimate(args, pipe, recording, recipe)
    announce(estimate)
    estimate.check(error=RecipeError)
    with _progress_shown(), _resumable(args.out):
        compressed = compress.compress(
            pipe,
            recording,
            recipe,
            args.out,
            samples_per_step=range_samples(args),
            inputs=inputs_of_batches(args, conditions, samples=samples, batch_size=recording.batch_size),
            reuse=None if args.reuse is None else compress.load(args.reuse),
            report=blocks.append,
        )
    payload = _summary(args, compressed, blocks, time.monotonic() - start)
    emit(args, payload, _summary_text(args.out, compressed, payload))
    return 0


def _estimate(
    args: argparse.Namespace, pipe: "DiffusionPipeline", recording: "CalibrationSet", recipe: "Recipe"
) -> "Estimate":
    from errata import compress

    return compress.estimate(
        pipe,
        recording,
        recipe,
        args.out,
        samples_per_step=range_samples(args),
        reuses=args.reuse is not None,
    )


def _summary(
    args: argparse.Namespace, compressed: "CompressedPipeline", blocks: "list[BlockReport]", seconds: float
) -> dict[str, Any]:
    schedule, measured = compressed.schedule, compressed.compression.calibrated_output
    payload = {
        "compressed": str(args.out),
        "recipe": compressed.compression.recipe.name,
        "blocks": [asdict(block) for block in blocks],
        "full_steps": list(schedule.full_steps),
        "num_steps": schedule.num_steps,
        "branch": schedule.branch,
        "choices": dict(compressed.compression.choices),
        "calibrated_output": None if measured is None else measured.to_json(),
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
    }
    cuda = peak_cuda_memory()
    return payload if cuda is None else {**payload, "peak_cuda_memory_bytes": cuda}


def _summary_text(out: Path, compressed: "CompressedPipeline", payload: dict[str, Any]) -> str:
    from errata.durations import duration
    from errata.runtime.paired_change import output_map_text

    memory = f"peak memory {megabytes(payload['peak_memory_bytes'])}"
    if "peak_cuda_memory_bytes" in payload:
        memory += f", on the GPU {megabytes(payload['peak_cuda_memory_bytes'])}"
    name = compressed.compression.recipe.name
    lines = [f"compressed with {name}: {out}"]
    if compressed.schedule.has_cache:
        lines.append(f"cache: {schedule_text(compressed.schedule)}")
    lines += [f"{subject}: {told}" for subject, told in compressed.compression.choices.items()]
    if (scheme := compressed.compression.scheme).layers:
        lines.append(f"output: {output_map_text(scheme, compressed.compression.calibrated_output)}")
    return "\n".join([*lines, f"{duration(payload['seconds'])}, {memory}"])


def _dry_run(args: argparse.Namespace, recording: "CalibrationSet", recipe: "Recipe") -> int:
    from errata import calibration
    from errata.compress.jobs.dry_run import Preview
    from errata.compress.jobs.preparation import check_model
    from errata.compress.jobs.stages import count_finished, work_directory

    pipe = calibration.load_pipeline(args.pipeline)
    check_model(pipe, recording)
    preview = Preview.of(pipe, recipe, num_steps=recording.num_steps, calls_per_step=recording.calls_per_step)
    estimate = _estimate(args, pipe, recording, recipe)
    payload = preview.to_json() | {"estimate": estimate.to_json()}
    text = f"{_preview_text(preview)}\n{estimate_text(estimate)}"
    if args.out is not None and (finished := count_finished(args.out)):
        payload["finished_stages"] = finished
        text += f"\n{finished} stages are already finished in {work_directory(args.out)}"
    emit(args, payload, text)
    return 0


def _preview_text(preview: "Preview") -> str:
    """Return a table of layers, then the cache, the rounding and the sizes."""
    columns = ("layer", "kind", "scheme", "input parts", "weight", "bytes")
    rows = table(columns, [_row(layer) for layer in preview.layers])
    facts = {
        "recipe": preview.recipe.name,
        "rounding": _rounding(preview),
        "exceptions": exceptions_text(preview.recipe),
        "cache": preview.cache_text(),
        "steps": str(preview.num_steps),
        **{name: megabytes(size) for name, size in preview.sizes.items()},
        "total": f"{megabytes(preview.total_bytes)}, {preview.total_bytes / preview.float32_bytes:.3f} of "
        f"the {megabytes(preview.float32_bytes)} of its float32 weights",
    }
    width = max(map(len, facts))
    lines = "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())
    return f"{rows}\n\n{lines}"


def _row(layer: "LayerDryRun") -> tuple[object, ...]:
    parts = " + ".join(map(str, layer.parts)) or "-"
    shape = " x ".join(map(str, layer.shape)) or "-"
    return layer.name, layer.kind, layer.scheme, parts, shape, layer.weight_bytes


def _rounding(preview: "Preview") -> str:
    quantization = preview.recipe.quantization
    if quantization is None:
        return "none, nothing is quantized"
    learned = quantization.rounding
    words = ["to nearest"]
    if learned is not None:
        words = [f"learned, {learned.iterations} iterations per block on {learned.samples} inputs"]
    words += ["weights equalized first"] * quantization.equalization
    words += ["biases corrected"] * quantization.bias_correction
    words += ["output calibrated where that helps"] * preview.recipe.calibrated_output
    return ", ".join(words)


def _sensitivity(args: argparse.Namespace, recording: "CalibrationSet", recipe: "Recipe") -> int:
    """Measure how much each layer alone changes the prediction, print that, and write `--out` if given."""
    _check_sensitivity(args.out, recipe)
    from errata import calibration
    from errata.compress.quantize import sensitivity

    table = sensitivity.measure(
        calibration.load_pipeline(args.pipeline),
        recording,
        recipe,
        samples=args.sensitivity_samples or SENSITIVITY_SAMPLES,
        steps=args.sensitivity_steps,
    )
    text = table.text().rstrip("\n")
    if args.out is not None:
        args.out.write_text(_table_file(table, args.out), encoding="utf-8")
        text += f"\ntable: {args.out}"
    emit(args, table.to_json(), text)
    return 0


def _check_sensitivity(out: Path | None, recipe: "Recipe") -> None:
    """Check, before the work, that there is something to measure and that the file can be written.

    Raises:
        UsageError: naming the option.
    """
    if recipe.quantization is None:
        raise UsageError(
            f"--sensitivity has no effect with the recipe {recipe.name}, which quantizes nothing; "
            "choose one such as w4a8"
        )
    if out is None:
        return
    if out.suffix not in (".json", ".csv"):
        raise UsageError(f"--out `{out}`: with --sensitivity, the name of the file must end in .json or .csv")
    if out.exists():
        raise UsageError(f"--out `{out}` exists; choose another file or remove it")
    if not out.parent.is_dir():
        raise UsageError(f"--out `{out}`: the directory `{out.parent}` does not exist; create it first")


def _table_file(table: "SensitivityTable", out: Path) -> str:
    return table.to_csv() if out.suffix == ".csv" else json.dumps(table.to_json(), indent=1) + "\n"


@contextmanager
def _progress_shown() -> Iterator[None]:
    """Print the progress of the stage on stderr, line by line."""
    logger = logging.getLogger("errata.compress")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say after Ctrl-C what was kept, and how to resume."""
    from errata.compress.jobs.stages import count_finished, work_directory

    try:
        yield
    except KeyboardInterrupt as stop:
        if not (finished := count_finished(out)):
            raise
        raise KeyboardInterrupt(
            f"interrupted; {finished} finished stages are kept in `{work_directory(out)}`; to resume, give "
            "the same command again"
        ) from stop
