"""The stages of a compression, in order: what each reads from those before, and what it leaves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from errata.calibration import CalibrationSet
from errata.compress.cache.cache_correction import fit_cache_correction
from errata.compress.cache.dps import search_schedule
from errata.compress.compressed import Compression
from errata.compress.jobs.image_judge import ImageJudge
from errata.compress.jobs.preparation import Preparation
from errata.compress.jobs.progress import BlockListener, BlockProgress
from errata.compress.quantize.bias_correction import correct_biases
from errata.compress.quantize.calibrated_output import changes_nothing, fit_output_map, identity_map
from errata.compress.quantize.equalization import equalize_
from errata.compress.quantize.observation import observe_ranges
from errata.compress.quantize.simulation import quantize_weights, range_table
from errata.compress.rounding.learned_rounding import learn_rounding
from errata.journal import Journal
from errata.large_weights import replace_parameter
from errata.runtime.recipes.caching import CacheQuant, DeepCache
from errata.runtime.recipes.quantization import Quantization
from errata.runtime.sampler import Sampler
from errata.runtime.schedule import CacheSchedule
from errata.runtime.scheme import Scheme

logger = logging.getLogger(__name__)

# Subjects of choices.
ROUNDING, SCHEDULE = "rounding", "cache schedule"


@dataclass(kw_only=True)
class Work:
    """One run: what it works on, and the table as far as it is filled.

    `unet` is a copy that computes in float32, in evaluation mode, which equalization changes; it shares its
    large weights with the pipeline.
    """

    judge: ImageJudge
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
        schedule = self._cache()
        return self._with_calibrated_output(schedule)

    def _cache(self) -> CacheSchedule:
        """Return the schedule, and put the cache's correction into the table.

        A searched schedule is compared with the uniform one, which it has to match on whole images.
        """
        schedule = self._schedule()
        correction = self._cache_correction(schedule, "cache_correction")
        uniform = self._uniform_schedule()
        if uniform is None or schedule == uniform or not self.judge.can_judge:
            self.table |= correction
            return schedule
        other = self._cache_correction(uniform, "cache_correction.uniform")
        scheme = replace(self._scheme, output=None)
        is_kept = self.judge.keeps(
            SCHEDULE,
            ("searched", self._compression(schedule, table=correction, scheme=scheme)),
            ("uniform", self._compression(uniform, table=other, scheme=scheme)),
        )
        self.table |= correction if is_kept else other
        return schedule if is_kept else uniform

    def _uniform_schedule(self) -> CacheSchedule | None:
        """Return the schedule that a search has to match; None where nothing is searched."""
        cache = self.preparation.recipe.cache
        if not isinstance(cache, CacheQuant) or cache.search != "dps":
            return None
        return DeepCache(interval=cache.interval).schedule(
            self.calibration_set.num_steps,
            branch=self.preparation.branch,
            calls_per_step=self.calibration_set.calls_per_step,
        )

    def _with_calibrated_output(self, schedule: CacheSchedule) -> Compression:
        """Fit the map of the predictions, and keep it if it helps images that the fit did not see."""
        output = self._scheme.output
        if output is None:
            return self._compression(schedule)
        idle = identity_map(self.calibration_set.num_steps, output.channels)
        if not self.judge.can_judge:
            return self._compression(schedule, table=idle)
        numbers = fit_output_map(
            self.unet, self.calibration_set, self._scheme, self.table, stage=self.journal.stage
        )
        plain, mapped = (self._compression(schedule, table=table) for table in (idle, numbers))
        if changes_nothing(numbers):
            return plain
        change = self.judge.change(("plain", plain), ("mapped", mapped))
        logger.info("calibrated output: PSNR to the float model from %s", change.text())
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
        self.table |= self._checked_rounding(quantization)
        self.table |= self._bias_correction(quantization)

    def _checked_rounding(self, quantization: Quantization) -> Mapping[str, Tensor]:
        """Return what learned rounding changed; nothing, if whole images are better rounded to nearest."""
        learned = self._learned_rounding(quantization)
        if not learned or not self.judge.can_judge:
            return learned
        schedule = CacheSchedule.uncached(
            self.calibration_set.num_steps, calls_per_step=self.calibration_set.calls_per_step
        )
        scheme = replace(self._scheme, correction=None, output=None)
        nearest, rounded = (
            self._compression(schedule, table=table, scheme=scheme) for table in ({}, learned)
        )
        return learned if self.judge.keeps(ROUNDING, ("learned", rounded), ("nearest", nearest)) else {}

    @property
    def _scheme(self) -> Scheme:
        return self.preparation.scheme

    def _equalize(self) -> dict[str, Tensor]:
        """Return the changed float parameters, without the weights of quantized layers, for the table."""

        def make() -> dict[str, Tensor]:
            names = equalize_(self.unet, self._scheme)
            return {name: self.unet.get_parameter(name) for name in names}

        changed = self.journal.stage("equalization", make)
        for name, value in changed.items():
            replace_parameter(self.unet, name, value)
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

    def _cache_correction(self, schedule: CacheSchedule, stage: str) -> Mapping[str, Tensor]:
        cache = self.preparation.recipe.cache
        if self._scheme.correction is None or not isinstance(cache, CacheQuant):
            return {}
        return self.journal.stage(
            stage,
            lambda: fit_cache_correction(
                self.unet, self.calibration_set, self._scheme, self.table, schedule, cache
            ),
        )

    def _compression(
        self,
        schedule: CacheSchedule,
        *,
        table: Mapping[str, Tensor] | None = None,
        scheme: Scheme | None = None,
    ) -> Compression:
        """Return what the table so far and `table` say together."""
        recorded = self.calibration_set
        return Compression(
            recipe=self.preparation.recipe,
            scheme=scheme or self._scheme,
            schedule=schedule,
            sampler=Sampler(
                scheduler_class=recorded.scheduler_class,
                num_inference_steps=recorded.num_inference_steps,
                timesteps=tuple(float(time) for time in recorded.timesteps),
            ),
            calibration=self.origin,
            table={**self.table, **(table or {})},
            choices=dict(self.judge.choices),
        )
