"""`compress`: a float pipeline, its calibration set and a recipe become a compressed pipeline."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from errata.calibration import CalibrationSet
from errata.compress.cache.cache_correction import fit_cache_correction
from errata.compress.cache.cache_features import check_regular_guidance
from errata.compress.cache.dps import search_schedule
from errata.compress.compressed import CompressedPipeline, Compression, write
from errata.compress.jobs.preparation import (
    Preparation,
    check_origin,
    origin_of,
    request_of,
    taken_table,
)
from errata.compress.jobs.progress import BlockListener, BlockProgress
from errata.compress.jobs.stages import open_journal, remove_leftovers
from errata.compress.quantize.bias_correction import correct_biases
from errata.compress.quantize.calibrated_output import changes_nothing, fit_output_map, identity_map
from errata.compress.quantize.equalization import equalize_
from errata.compress.quantize.held_out_images import HeldOutImages
from errata.compress.quantize.observation import observe_ranges
from errata.compress.quantize.recorded_inputs import SAMPLES_PER_STEP
from errata.compress.quantize.simulation import quantize_weights, range_table
from errata.compress.rounding.learned_rounding import learn_rounding
from errata.directories import check_is_vacant
from errata.errors import CalibrationError, RecipeError
from errata.journal import Journal
from errata.quality.paired_change import PairedChange
from errata.runtime.recipes.caching import CacheQuant
from errata.runtime.recipes.quantization import Quantization
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.sampler import Sampler
from errata.runtime.schedule import CacheSchedule
from errata.runtime.scheme import Scheme

logger = logging.getLogger(__name__)


def compress(
    pipe: DiffusionPipeline,
    calibration_set: CalibrationSet,
    recipe: Recipe | str,
    out: str | Path,
    *,
    samples_per_step: int = SAMPLES_PER_STEP,
    reuse: CompressedPipeline | None = None,
    report: BlockListener | None = None,
) -> CompressedPipeline:
    """Compress the UNet of `pipe` by `recipe` and write the result to `out`.

    `pipe` is left as it was; all work is done on a float32 copy of its UNet. Every quantizer gets a range at
    every recorded step, from full passes of the float UNet, whatever the cache schedule skips.

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
    if recipe.cache is not None:
        check_regular_guidance(calibration_set)
    origin = origin_of(calibration_set, samples_per_step=samples_per_step)
    taken = None if reuse is None else taken_table(reuse, recipe, origin)
    request = request_of(pipe.unet, origin, recipe, samples_per_step=samples_per_step)
    with open_journal(out, request) as journal:
        work = _Work(
            pipe=pipe,
            unet=_private_copy(pipe.unet),
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


@dataclass(kw_only=True)
class _Work:
    """One run: what it works on, and the table as far as it is filled.

    `pipe` is the float pipeline, which is only sampled.
    `unet` is a float32 copy, in evaluation mode, which equalization changes.
    """

    pipe: DiffusionPipeline
    unet: nn.Module
    calibration_set: CalibrationSet
    preparation: Preparation
    samples_per_step: int
    journal: Journal
    listener: BlockListener | None
    origin: Mapping[str, Any]
    taken: Mapping[str, Tensor] | None
    table: dict[str, Tensor] = field(default_factory=dict)

    def run(self) -> Compression:
        """Run every stage that the recipe asks for, in order; a later one reads what earlier ones left."""
        quantization = self.preparation.recipe.quantization
        if quantization is not None:
            self._quantize(quantization)
        schedule = self._schedule()
        self.table |= self._cache_correction(schedule)
        if self._scheme.output is None:
            return self._compression(schedule)
        return self._with_calibrated_output(schedule, self._scheme.output.channels)

    def _with_calibrated_output(self, schedule: CacheSchedule, channels: int) -> Compression:
        """Fit the map of the predictions, and keep it if it helps images that the fit did not see."""
        stage = self.journal.stage
        fitted = fit_output_map(self.unet, self.calibration_set, self._scheme, self.table, stage=stage)
        idle = identity_map(self.calibration_set.num_steps, channels)
        plain, mapped = (self._compression(schedule, output=numbers) for numbers in (idle, fitted))
        if changes_nothing(fitted):
            return plain
        try:
            held_out = HeldOutImages(self.pipe, self.calibration_set, stage=stage)
            change = PairedChange.of(
                held_out.psnr("plain", CompressedPipeline(self.pipe, plain, Path())),
                held_out.psnr("mapped", CompressedPipeline(self.pipe, mapped, Path())),
            )
        except CalibrationError as problem:
            logger.warning("%s", _not_judged(problem))
            return plain
        logger.info("calibrated output: PSNR to the float model %s", change.text())
        if not change.helps:
            logger.info("it does not help here, and is left out")
        return replace(mapped if change.helps else plain, calibrated_output=change)

    def _quantize(self, quantization: Quantization) -> None:
        if quantization.equalization:
            self.table |= self._equalize()  # also of the network that a cache is fitted on
        if self.taken is not None:
            self.table |= self.taken
            return
        self.table |= self.journal.stage("weights", lambda: quantize_weights(self.unet, self._scheme))
        self.table |= self._ranges()
        self.table |= self._learned_rounding(quantization)
        self.table |= self._bias_correction(quantization)

    @property
    def _scheme(self) -> Scheme:
        return self.preparation.scheme

    def _equalize(self) -> dict[str, Tensor]:
        """Return the changed float parameters, without the weights of quantized layers, for the table."""

        def make() -> dict[str, Tensor]:
            names = equalize_(self.unet, self._scheme)
            return {name: self.unet.get_parameter(name) for name in names}

        changed = self.journal.stage("equalization", make)
        with torch.no_grad():
            for name, value in changed.items():
                self.unet.get_parameter(name).copy_(value)
        weights = {f"{layer.name}.weight" for layer in self._scheme.layers}
        return {name: value for name, value in changed.items() if name not in weights}

    def _ranges(self) -> dict[str, Tensor]:
        ranges = observe_ranges(
            self.unet,
            self.calibration_set,
            self._scheme,
            samples_per_step=self.samples_per_step,
            stage=self.journal.stage,
        )
        return range_table(ranges)

    def _schedule(self) -> CacheSchedule:
        cache, branch = self.preparation.recipe.cache, self.preparation.branch
        num_calls, per_step = self.calibration_set.num_steps, self.calibration_set.calls_per_step
        if cache is None:
            return CacheSchedule.uncached(num_calls, calls_per_step=per_step)
        if not isinstance(cache, CacheQuant):
            return cache.schedule(num_calls, branch=branch, calls_per_step=per_step)

        def make() -> dict[str, Tensor]:
            found = search_schedule(self.unet, self.calibration_set, cache, branch)
            return {"full_steps": torch.tensor(found.full_steps)}

        steps = self.journal.stage("schedule", make)["full_steps"].tolist()
        return CacheSchedule(
            num_steps=num_calls, full_steps=tuple(steps), branch=branch, calls_per_step=per_step
        )

    def _learned_rounding(self, quantization: Quantization) -> Mapping[str, Tensor]:
        if quantization.rounding is None:
            return {}
        progress = BlockProgress("learned rounding", self.journal.stage, self.listener)
        return learn_rounding(
            self.unet,
            self.calibration_set,
            self._scheme,
            self.table,
            quantization.rounding,
            stage=progress.stage,
            report=progress.report,
            scratch=self.journal.scratch,
        )

    def _bias_correction(self, quantization: Quantization) -> Mapping[str, Tensor]:
        if not quantization.bias_correction:
            return {}
        progress = BlockProgress("bias correction", self.journal.stage, self.listener)
        return correct_biases(
            self.unet,
            self.calibration_set,
            self._scheme,
            self.table,
            stage=progress.stage,
            report=progress.report,
        )

    def _cache_correction(self, schedule: CacheSchedule) -> Mapping[str, Tensor]:
        cache = self.preparation.recipe.cache
        if self._scheme.correction is None or not isinstance(cache, CacheQuant):
            return {}
        return self.journal.stage(
            "cache_correction",
            lambda: fit_cache_correction(
                self.unet, self.calibration_set, self._scheme, self.table, schedule, cache
            ),
        )

    def _compression(
        self, schedule: CacheSchedule, *, output: Mapping[str, Tensor] | None = None
    ) -> Compression:
        recorded = self.calibration_set
        return Compression(
            recipe=self.preparation.recipe,
            scheme=self._scheme,
            schedule=schedule,
            sampler=Sampler(
                scheduler_class=recorded.scheduler_class,
                num_inference_steps=recorded.num_inference_steps,
                timesteps=tuple(float(time) for time in recorded.timesteps),
            ),
            calibration=self.origin,
            table={**self.table, **(output or {})},
        )


def _not_judged(problem: CalibrationError) -> str:
    return (
        f"the output was not calibrated: {problem}, so nothing could show whether it helps; an artifact can "
        "get an errata sheet later, see `errata sheet`"
    )


def _private_copy(unet: nn.Module) -> nn.Module:
    return copy.deepcopy(unet).float().eval()
