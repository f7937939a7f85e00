"""Whether a choice of the compression helps: PSNR of whole images to the float model's, from fresh noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.calibration import CalibrationSet
from errata.calibration.pipelines import check_pipeline, run_batch, untouched
from errata.errors import CalibrationError
from errata.journal import Stage
from errata.quality.paired import psnr
from errata.runtime.pipeline import SteppedPipeline

IMAGES = 16
# Far from the seeds of calibration sets, of sheets and of images that people draw.
_FIRST_SEED = 3_000_000_000
_BATCH_SIZE = 16


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
        calibration_set: whose steps, guidance, prompts and other arguments are used.
        stage: where finished images are kept.

    Raises:
        CalibrationError: the pipeline needs arguments that the set does not hold, or makes no images.
    """

    def __init__(self, pipe: DiffusionPipeline, calibration_set: CalibrationSet, *, stage: Stage) -> None:
        self._pipe, self._set, self._stage = pipe, calibration_set, stage
        self._batches = list(_batches(pipe, calibration_set))
        self._right = [self._kept("float", number, pipe) for number in range(len(self._batches))]

    def psnr(self, name: str, compressed: SteppedPipeline) -> Tensor:
        """Return PSNR of each image to the float model's, `(N,)`, float64, in dB; kept under that name.

        `compressed` is made for this: its progress bar is turned off.
        """
        compressed.pipe.set_progress_bar_config(disable=True)
        batches = enumerate(self._right)
        return torch.cat([psnr(self._kept(name, number, compressed), right) for number, right in batches])

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
        return torch.from_numpy(images).permute(0, 3, 1, 2).float().clamp(0, 1).contiguous()


def _batches(pipe: DiffusionPipeline, calibration_set: CalibrationSet) -> Iterator[HeldOutBatch]:
    """Yield batches of `IMAGES` samples in all, or of as many as were recorded.

    Mappings of arguments describe whole sample-batches, which are therefore kept as they are.
    """
    arguments = calibration_set.arguments()
    if arguments is None:
        raise CalibrationError(
            f"`{calibration_set.path}` does not hold the arguments that {type(pipe).__name__} was called with"
        )
    check_pipeline(
        pipe,
        has_prompts=arguments.prompts is not None,
        has_inputs=arguments.inputs is not None,
        guidance_scale=calibration_set.guidance_scale,
    )
    total = calibration_set.num_samples
    size = _BATCH_SIZE if arguments.inputs is None else calibration_set.batch_size
    for number, first in enumerate(range(0, min(IMAGES, total), size)):
        count = min(size, total - first) if arguments.inputs else min(size, IMAGES - first, total - first)
        samples = range(first, first + count)
        yield HeldOutBatch(
            seeds=[_FIRST_SEED + sample for sample in samples],
            prompts=None if arguments.prompts is None else list(arguments.prompts[first : first + count]),
            inputs=None if arguments.inputs is None else arguments.inputs[number],
        )
