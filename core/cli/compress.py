"""`errata compress`: simulate low bits and a cache."""

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.dry_run import preview_text
from errata.cli.output import emit, megabytes, schedule_text
from errata.cli.recipes import add_recipe_options, recipe_from
from errata.cli.sensitivities import measure
from errata.cli.usage import Commands, UsageError, add_command, positive
from errata.memory import peak_cuda_memory, peak_memory

if TYPE_CHECKING:
    from errata.calibration import CalibrationSet
    from errata.compress import CompressedPipeline, Recipe
    from errata.compress.jobs.progress import BlockReport

DETAILS = """\
Recipes: w8a8 and w4a8 are bits of weights and activations; w4a8-learned learns how weights are rounded;
deepcache-N evaluates every N-th step in full and reuses deep features in the others, deepcache:steps=0/4/9
has full steps of your own, cachequant-N searches them and corrects the reuse; `+` joins the two, and options
follow a colon: w8a8+deepcache-10:branch=1. A recipe may also be a .json or .yaml file. docs/compress.md has
all options. Refuses a directory that is not empty.

What is finished is kept in DIR.partial until DIR is complete. An interrupted run goes on where it stopped:
give the same command again.

  errata compress google/ddpm-cifar10-32 --calibration runs/cifar/calibration \\
      --recipe w4a8-learned+cachequant-5 --out runs/cifar/compressed
  errata compress google/ddpm-cifar10-32 --calibration runs/cifar/calibration --recipe w4a8 --dry-run
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "compress",
        summary="quantize a calibrated pipeline and give it a cache",
        details=DETAILS,
    )
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="the one that was calibrated: hub name or local folder"
    )
    parser.add_argument(
        "--calibration", type=Path, required=True, metavar="DIR", help="what `errata calibrate` wrote"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of the result; with --sensitivity a .json or .csv file",
    )
    parser.add_argument(
        "--range-samples",
        type=positive,
        metavar="N",
        help="trajectories that activation ranges are chosen on, at most (default: 64)",
    )
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="DIR",
        help="take codes and ranges from an earlier result with the same model, recording and quantizer",
    )
    add_recipe_options(parser)
    add_modes(parser)
    parser.set_defaults(run=run)


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Declare what the command can do instead of compressing."""
    modes = parser.add_argument_group("instead of compressing")
    modes.add_argument(
        "--dry-run",
        action="store_true",
        help="show what would be quantized and how, and the size that results; write nothing",
    )
    modes.add_argument(
        "--sensitivity",
        action="store_true",
        help="quantize each layer alone, and show how much that changes the network's prediction",
    )
    modes.add_argument(
        "--sensitivity-samples", type=positive, metavar="N", help="recorded samples a step (default: 16)"
    )
    modes.add_argument(
        "--sensitivity-steps", type=positive, metavar="N", help="evenly spaced steps (default: all)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check_options(args)
    recipe = recipe_from(args)

    from errata import calibration

    if args.out is not None and not args.sensitivity:
        _check_is_vacant(args.out)
    recording = calibration.load(args.calibration)
    if args.dry_run:
        return _dry_run(args, recording, recipe)
    if args.sensitivity:
        return measure(args, recording, recipe)
    return _compress(args, recording, recipe)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse options that have no use together.

    Raises:
        UsageError: naming one.
    """
    if args.dry_run and args.sensitivity:
        raise UsageError("--dry-run and --sensitivity are two different things; give one of them")
    if args.out is None and not (args.dry_run or args.sensitivity):
        raise UsageError("--out is required: the directory of the result; see `errata compress --help`")
    idle = []
    if not args.sensitivity:
        idle += ["sensitivity_samples", "sensitivity_steps"]
    if args.sensitivity or args.dry_run:
        idle += ["range_samples", "reuse"]
    for name in idle:
        if getattr(args, name) is not None:
            mode = "--dry-run" if args.dry_run else "--sensitivity"
            rule = f"with {mode}" if name in ("range_samples", "reuse") else "without --sensitivity"
            raise UsageError(f"--{name.replace('_', '-')} has no effect {rule}; leave it out")


def _check_is_vacant(out: Path) -> None:
    from errata.compress.jobs.stages import remove_leftovers
    from errata.directories import check_is_vacant
    from errata.errors import RecipeError

    remove_leftovers(out)
    check_is_vacant(out, error=RecipeError)


def _compress(args: argparse.Namespace, recording: "CalibrationSet", recipe: "Recipe") -> int:
    from errata import calibration, compress
    from errata.compress.quantize.recorded_inputs import SAMPLES_PER_STEP

    if args.range_samples is not None and recipe.quantization is None:
        raise UsageError(
            f"--range-samples has no effect with the recipe {recipe.name}, which quantizes nothing; "
            "leave it out"
        )
    blocks: list[BlockReport] = []
    start = time.monotonic()
    pipe = calibration.load_pipeline(args.pipeline)
    with _progress_told(), _resumable(args.out):
        compressed = compress.apply(
            pipe,
            recording,
            recipe,
            args.out,
            samples_per_step=args.range_samples or SAMPLES_PER_STEP,
            reuse=None if args.reuse is None else compress.load(args.reuse),
            report=blocks.append,
        )
    payload = _summary(args, compressed, blocks, time.monotonic() - start)
    emit(args, payload, _summary_text(args.out, compressed, payload))
    return 0


def _summary(
    args: argparse.Namespace, compressed: "CompressedPipeline", blocks: "list[BlockReport]", seconds: float
) -> dict[str, Any]:
    schedule = compressed.schedule
    payload = {
        "compressed": str(args.out),
        "recipe": compressed.compression.recipe.name,
        "blocks": [asdict(block) for block in blocks],
        "full_steps": list(schedule.full_steps),
        "num_steps": schedule.num_steps,
        "branch": schedule.branch,
        "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(),
    }
    cuda = peak_cuda_memory()
    return payload if cuda is None else {**payload, "peak_cuda_memory_bytes": cuda}


def _summary_text(out: Path, compressed: "CompressedPipeline", payload: dict[str, Any]) -> str:
    from errata.durations import duration

    memory = f"peak memory {megabytes(payload['peak_memory_bytes'])}"
    if "peak_cuda_memory_bytes" in payload:
        memory += f", on the GPU {megabytes(payload['peak_cuda_memory_bytes'])}"
    name = compressed.compression.recipe.name
    lines = [f"{name} model is in {out}"]
    if compressed.schedule.has_cache:
        lines.append(f"cache: {schedule_text(compressed.schedule)}")
    return "\n".join([*lines, f"{duration(payload['seconds'])}, {memory}"])


def _dry_run(args: argparse.Namespace, recording: "CalibrationSet", recipe: "Recipe") -> int:
    from errata import calibration
    from errata.compress.jobs.dry_run import Preview
    from errata.compress.jobs.preparation import check_model
    from errata.compress.jobs.stages import count_finished, work_directory

    pipe = calibration.load_pipeline(args.pipeline)
    check_model(pipe, recording)
    preview = Preview.of(pipe, recipe, num_steps=recording.num_steps, calls_per_step=recording.calls_per_step)
    payload, text = preview.to_json(), preview_text(preview)
    if args.out is not None and (finished := count_finished(args.out)):
        payload["finished_stages"] = finished
        text += f"\n{finished} stages are finished in {work_directory(args.out)}"
    emit(args, payload, text)
    return 0


@contextmanager
def _progress_told() -> Iterator[None]:
    """Let the stage say on stderr what it is at, line by line."""
    logger = logging.getLogger("errata.compress")
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Say after Ctrl-C what is left to go on with."""
    from errata.compress.jobs.stages import count_finished, work_directory

    try:
        yield
    except KeyboardInterrupt as stop:
        if not (finished := count_finished(out)):
            raise
        raise KeyboardInterrupt(
            f"interrupted; {finished} finished stages are kept in `{work_directory(out)}`: "
            "give the same command again to go on"
        ) from stop
