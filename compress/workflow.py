"""`apply`: a float pipeline, its calibration set and a recipe become a compressed pipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.calibration import CalibrationSet, model_fingerprint
from errata.calibration.fingerprint import public_config
from errata.compress.compressed import CompressedPipeline, Compression, Sampler, write
from errata.compress.observation import SAMPLES_PER_STEP, observe_ranges
from errata.compress.recipe import Recipe
from errata.compress.scheme import Scheme
from errata.compress.simulation import quantize_weights, range_table
from errata.compress.unet import BranchedUNet
from errata.directories import staged_directory
from errata.errors import CalibrationError, RecipeError


def apply(
    pipe: DiffusionPipeline, calibration_set: CalibrationSet, recipe: Recipe | str, out: str | Path
) -> CompressedPipeline:
    """Compresses the UNet of `pipe` by `recipe` and writes the result to `out`.

    `pipe` is left as it was. Every quantizer gets a range at every recorded step, from full passes of the
    float UNet over up to 64 recorded samples, whatever the cache schedule skips.

    Args:
        pipe: a float diffusers pipeline with a `UNet2DModel`.
        calibration_set: trajectories of this very pipeline.
        recipe: a `Recipe` or the name of one.
        out: a directory that does not exist yet.

    Raises:
        TypeError: `calibration_set` is not an open `CalibrationSet`.
        RecipeError: unknown recipe, a branch that the UNet does not have, an unsupported UNet, `out` exists.
        CalibrationError: the trajectories come from another model or scheduler, or were altered.
    """
    if not isinstance(calibration_set, CalibrationSet):
        raise TypeError(
            f"apply takes a CalibrationSet, got {type(calibration_set).__name__}; "
            "open one with errata.calibration.load(path)"
        )
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    branched = BranchedUNet(pipe.unet)
    schedule = recipe.schedule(calibration_set.num_steps, max_branch=branched.max_branch)
    scheme = Scheme.of(pipe.unet, recipe.quantization)
    _check_origin(pipe, calibration_set)
    calibration_set.verify()
    if scheme.layers and pipe.unet.dtype != torch.float32:
        raise RecipeError(
            f"recipe {recipe.name} needs float32 weights, the UNet has {pipe.unet.dtype}; "
            "convert it first, pipe.unet.to(torch.float32), and collect again"
        )
    with staged_directory(Path(out), error=RecipeError) as staging:
        table: dict[str, Tensor] = {}
        if scheme.layers:
            table = quantize_weights(pipe.unet, scheme)
            table |= range_table(observe_ranges(pipe.unet, calibration_set, scheme))
        compression = Compression(
            recipe=recipe,
            scheme=scheme,
            schedule=schedule,
            sampler=Sampler(
                scheduler_class=calibration_set.scheduler_class,
                num_inference_steps=calibration_set.num_inference_steps,
                timesteps=tuple(float(time) for time in calibration_set.timesteps),
            ),
            calibration={
                "fingerprint": calibration_set.fingerprint,
                "num_samples": calibration_set.num_samples,
                "samples_per_step": min(SAMPLES_PER_STEP, calibration_set.num_samples),
            },
            table=table,
        )
        write(pipe, compression, staging)
    return CompressedPipeline(pipe, compression, Path(out))


def _check_origin(pipe: DiffusionPipeline, calibration_set: CalibrationSet) -> None:
    found = model_fingerprint(pipe.unet)
    if found != calibration_set.fingerprint:
        raise CalibrationError(
            f"the calibration set {calibration_set.path} was recorded from another model "
            f"(fingerprint {calibration_set.fingerprint[:12]}…, this one has {found[:12]}…); collect again"
        )
    scheduler = type(pipe.scheduler).__name__
    config = public_config(pipe.scheduler.config)
    if scheduler != calibration_set.scheduler_class:
        raise CalibrationError(
            f"the calibration set {calibration_set.path} was recorded with "
            f"{calibration_set.scheduler_class}, the pipeline has {scheduler}; "
            "use the same scheduler or collect again"
        )
    differing = sorted(
        key
        for key in config.keys() | calibration_set.scheduler_config.keys()
        if config.get(key) != calibration_set.scheduler_config.get(key)
    )
    if differing:
        raise CalibrationError(
            f"the calibration set {calibration_set.path} was recorded with other scheduler settings: "
            f"{', '.join(differing)} differ; use the same ones or collect again"
        )
