"""`compress`: a float pipeline, its calibration set and a recipe become a compressed pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from errata.calibration import CalibrationSet
from errata.compress.cache.cache_features import check_regular_guidance
from errata.compress.compressed import CompressedPipeline, write
from errata.compress.jobs.image_judge import HeldOutImages, ImageJudge
from errata.compress.jobs.preparation import (
    Preparation,
    check_origin,
    origin_of,
    request_of,
    taken_table,
)
from errata.compress.jobs.progress import BlockListener
from errata.compress.jobs.stages import open_journal, remove_leftovers
from errata.compress.jobs.work import ROUNDING, Work
from errata.compress.quantize.recorded_inputs import SAMPLES_PER_STEP
from errata.directories import check_is_vacant
from errata.errors import RecipeError
from errata.large_weights import sharing_copy
from errata.runtime.recipes.recipe import Recipe


def compress(
    pipe: DiffusionPipeline,
    calibration_set: CalibrationSet,
    recipe: Recipe | str,
    out: str | Path,
    *,
    samples_per_step: int = SAMPLES_PER_STEP,
    inputs: Iterable[Mapping[str, Any]] | None = None,
    reuse: CompressedPipeline | None = None,
    report: BlockListener | None = None,
) -> CompressedPipeline:
    """Compress the UNet of `pipe` by `recipe` and write the result to `out`.

    `pipe` is left as it was. All work is done in float32, on copies of its UNet that share its large weights,
    as they are stored. Every quantizer gets a range at every recorded step, from full passes of the float
    UNet, whatever the cache schedule skips.

    What is finished is kept in `NAME.partial` beside `out` (see `errata.journal`): the same
    call continues where a killed one stopped, and ends with the same bytes as a run without a break (same
    machine, versions and number of threads). The directory is removed when `out` is complete.

    Args:
        pipe: a float diffusers pipeline with a UNet, in float32, float16 or bfloat16.
        calibration_set: trajectories of this very pipeline.
        recipe: a `Recipe` or the name of one.
        out: a directory that does not exist yet; its parent does.
        samples_per_step: trajectories that activation ranges are chosen on, at most; its default is that of
            the source.
        inputs: what `calibrate` was given under that name, where the calibration set does not hold it: images
            and tensors. Without them the images of such a pipeline cannot be judged, and its output is not
            calibrated.
        reuse: an earlier result with the same quantization, model and trajectories, whose codes and ranges
            are reused instead of being computed again; the result is the same.
        report: called after each block that is reconstructed or corrected, resumed ones included.

    Raises:
        TypeError: `calibration_set` is not an open `CalibrationSet`, or `reuse` no `CompressedPipeline`.
        RecipeError: unknown recipe, a branch that the UNet does not have, an unsupported UNet; `out` exists,
            another process works on it, or unfinished work of another request lies beside it; `reuse` has
            another quantization, model or data.
        CalibrationError: the trajectories come from another model or scheduler, or were altered.
    """
    if not isinstance(calibration_set, CalibrationSet):
        raise TypeError(
            f"compress takes a CalibrationSet, got {type(calibration_set).__name__}; "
            "open one with errata.calibration.load(path)"
        )
    if type(samples_per_step) is not int or samples_per_step < 1:
        raise RecipeError(f"samples_per_step={samples_per_step!r}; allowed are whole numbers of at least 1")
    out = Path(out)
    remove_leftovers(out)
    check_is_vacant(out, error=RecipeError)
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    preparation = Preparation.of(pipe, recipe)
    check_origin(pipe, calibration_set)
    arguments = calibration_set.arguments(inputs)
    if recipe.cache is not None:
        check_regular_guidance(calibration_set)
    origin = origin_of(calibration_set, samples_per_step=samples_per_step)
    taken = None if reuse is None else taken_table(reuse, recipe, origin)
    request = request_of(pipe.unet, origin, recipe, samples_per_step=samples_per_step)
    with open_journal(out, request) as journal:
        judge = ImageJudge(HeldOutImages(pipe, calibration_set, arguments, stage=journal.stage))
        if reuse is not None:
            judge.remember(reuse.compression.choices, subject=ROUNDING)
        work = Work(
            judge=judge,
            unet=sharing_copy(pipe.unet, torch.float32),
            calibration_set=calibration_set,
            preparation=preparation,
            samples_per_step=samples_per_step,
            journal=journal,
            listener=report,
            origin=origin,
            taken=taken,
        )
        compression = work.run()
        with journal.result() as staging:
            write(pipe, compression, staging)
    return CompressedPipeline(pipe, compression, out)


apply = compress
"""Older name of `compress`."""
