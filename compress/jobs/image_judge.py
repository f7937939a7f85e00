"""Choices of a compression that whole images decide, from noise that nothing was fitted to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.calibration import CalibrationSet
from errata.calibration.arguments import PipelineArguments
from errata.calibration.pipelines import check_pipeline, run_batch, untouched
from errata.compress.compressed import CompressedPipeline, Compression
from errata.errors import CalibrationError
from errata.journal import Stage
from errata.quality.paired import psnr
from errata.quality.pixels import from_array
from errata.runtime.paired_change import PairedChange

logger = logging.getLogger(__name__)

IMAGES = 16
# Far from the seeds of calibration sets, of sheets and of images that people draw.
_FIRST_SEED = 3_000_000_000
_BATCH_SIZE = 16
FEWEST_IMAGES = 4

Candidate = tuple[str, Compression]
"""A compression, and its name in the journal."""


class ImageJudge:
    """Compares compressions of a pipeline by the PSNR of their images to the float model's.

    Attributes:
        choices: what was decided, in words, by subject.
    """

    def __init__(self, images: HeldOutImages) -> None:
        self._images = images
        self._known: dict[str, Tensor] = {}
        self.choices: dict[str, str] = {}

    @cached_property
    def can_judge(self) -> bool:
        """Whether the pipeline can be sampled as it was recorded; if not, a warning says why."""
        try:
            return bool(self._images.right)
        except CalibrationError as problem:
            logger.warning("%s", _without_images(problem))
            return False

    def remember(self, choices: Mapping[str, str], *, subject: str) -> None:
        """Take over what an earlier compression decided on a subject, if it did."""
        if subject in choices:
            self.choices[subject] = choices[subject]

    def change(self, before: Candidate, after: Candidate) -> PairedChange:
        """Return what the second does to the PSNR of the first."""
        return PairedChange.of(self._psnr(before), self._psnr(after))

    def keeps(self, subject: str, chosen: Candidate, simple: Candidate) -> bool:
        """Return whether what the recipe asks for stays: unless the simple choice is better beyond noise."""
        change = self.change(chosen, simple)
        kept = simple if change.helps else chosen
        self.choices[subject] = (
            f"{kept[0]}; with {simple[0]} in place of {chosen[0]}, PSNR to the float model goes from "
            f"{change.text()}"
        )
        (logger.warning if change.helps else logger.info)("%s: %s", subject, self.choices[subject])
        return not change.helps

    def _psnr(self, candidate: Candidate) -> Tensor:
        name, compression = candidate
        if name not in self._known:
            self._known[name] = self._images.psnr(name, compression)
        return self._known[name]


def _without_images(problem: CalibrationError) -> str:
    return (
        f"no images to judge by: {problem}; the output is not calibrated, and learned rounding and searched "
        "schedules are kept as they are; an artifact can get an errata sheet later, see `errata sheet`"
    )


@dataclass(frozen=True, kw_only=True)
class HeldOutBatch:
    """Samples of one run of the pipeline."""

    seeds: list[int]
    prompts: list[str] | None
    inputs: Mapping[str, Any] | None


class HeldOutImages:
    """Samples a pipeline and its compressed forms as its calibration set was sampled, from other noise.

    Args:
        pipe: the float pipeline; it is left as it was.
        calibration_set: whose steps and guidance are used.
        arguments: what else the pipeline was called with there; None if that is not known.
        stage: where finished images are kept.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        calibration_set: CalibrationSet,
        arguments: PipelineArguments | None,
        *,
        stage: Stage,
    ) -> None:
        self._pipe, self._set, self._arguments, self._stage = pipe, calibration_set, arguments, stage

    def psnr(self, name: str, compression: Compression) -> Tensor:
        """Return PSNR of each image to the float model's, `(N,)`, float64, in dB; kept under that name.

        Raises:
            CalibrationError: as `right`.
        """
        compressed = CompressedPipeline(self._pipe, compression, Path())
        compressed.pipe.set_progress_bar_config(disable=True)
        batches = enumerate(self.right)
        return torch.cat([psnr(self._kept(name, number, compressed), right) for number, right in batches])

    @cached_property
    def _batches(self) -> list[HeldOutBatch]:
        return list(_batches(self._pipe, self._set, self._arguments))

    @cached_property
    def right(self) -> list[Tensor]:
        """The float model's images, one `(N, C, H, W)` for each batch.

        Raises:
            CalibrationError: the arguments are not known, there are too few trajectories, or the pipeline
                makes no images.
        """
        return [self._kept("float", number, self._pipe) for number in range(len(self._batches))]

    def _kept(self, name: str, number: int, call: Callable[..., Any]) -> Tensor:
        made = self._stage(f"held_out.{name}.{number:03d}", lambda: {"images": self._images(number, call)})
        return made["images"]

    def _images(self, number: int, call: Callable[..., Any]) -> Tensor:
        """Return `(N, C, H, W)`, float32, in [0, 1]."""
        batch = self._batches[number]
        with untouched(self._pipe, None):
            output = run_batch(
                self._pipe,
                seeds=batch.seeds,
                num_inference_steps=self._set.num_inference_steps,
                guidance_scale=self._set.guidance_scale,
                prompts=batch.prompts,
                inputs=batch.inputs,
                call=call,
                output_type="np",
            )
        images = getattr(output, "images", None)
        if not isinstance(images, np.ndarray) or images.ndim != 4:
            raise CalibrationError(f"{type(self._pipe).__name__} makes no images that could be compared")
        return from_array(images)


def _batches(
    pipe: DiffusionPipeline, calibration_set: CalibrationSet, arguments: PipelineArguments | None
) -> Iterator[HeldOutBatch]:
    """Yield batches of `IMAGES` samples in all, or of as many as were recorded.

    Mappings of arguments describe whole sample-batches, which are therefore kept as they are.
    """
    if arguments is None:
        raise CalibrationError(
            f"`{calibration_set.path}` does not hold the arguments that {type(pipe).__name__} was called "
            "with; give compress the input images once more"
        )
    check_pipeline(
        pipe,
        has_prompts=arguments.prompts is not None,
        has_inputs=arguments.inputs is not None,
        guidance_scale=calibration_set.guidance_scale,
    )
    total = calibration_set.num_samples
    if total < FEWEST_IMAGES:
        raise CalibrationError(
            f"`{calibration_set.path}` has {total} of the {FEWEST_IMAGES} trajectories that a comparison "
            "takes at least"
        )
    # No more at once than the recording took: the user chose that number for the memory that there is.
    size = calibration_set.batch_size if arguments.inputs else min(_BATCH_SIZE, calibration_set.batch_size)
    for number, first in enumerate(range(0, min(IMAGES, total), size)):
        count = min(size, total - first) if arguments.inputs else min(size, IMAGES - first, total - first)
        samples = range(first, first + count)
        yield HeldOutBatch(
            seeds=[_FIRST_SEED + sample for sample in samples],
            prompts=None if arguments.prompts is None else list(arguments.prompts[first : first + count]),
            inputs=None if arguments.inputs is None else arguments.inputs[number],
        )
