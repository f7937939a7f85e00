"""Samples float and deployed pipelines from equal noise, with a timer. Planner and report use only this."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.correct.call_timer import CallTimer
from errata.correct.pipeline import CorrectedPipeline, wrap
from errata.correct.plans import Plan
from errata.deploy import DeployedPipeline
from errata.quality.pixels import from_array
from errata.runtime.schedule import StepKind

Inputs = Callable[[range], Mapping[str, Any]]
"""Pipeline keyword arguments for the samples of one batch, given their indices."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One batch: images (B, C, H, W), float32 in [0, 1] on the CPU; denoiser calls are per image.

    `calls` has the seconds of every denoiser call by kind, if the sampler has a `CallTimer`.
    """

    images: Tensor
    seconds: float
    base: Mapping[StepKind, float]
    extra: Mapping[StepKind, float]
    calls: Mapping[StepKind, Sequence[float]] = field(default_factory=dict)


class Sampler(Protocol):
    """Samples the images of some indices; image i depends on `seed + i` alone."""

    def sample(self, indices: range) -> Sampled:
        """Return one batch."""


class FloatSampler:
    """The uncompressed pipeline, with its denoiser calls counted and timed."""

    def __init__(
        self, pipe: DiffusionPipeline, *, num_inference_steps: int, seed: int, inputs: Inputs
    ) -> None:
        self._pipe = copy.copy(pipe)  # the weights are shared; scheduler state and progress bar are not
        self._pipe.scheduler = copy.deepcopy(pipe.scheduler)
        self._pipe.set_progress_bar_config(disable=True)
        self._steps, self._seed, self._inputs = num_inference_steps, seed, inputs

    def sample(self, indices: range) -> Sampled:
        """Return one batch, see `Sampler.sample`."""
        arguments = {**self._inputs(indices), "num_inference_steps": self._steps}
        timer = CallTimer()
        remove = timer.watch_module(self._pipe.unet)
        try:
            images, seconds = _timed(self._pipe, arguments, indices, self._seed)
        finally:
            remove()
        calls = timer.take()
        return Sampled(
            images=images, seconds=seconds, base={"full": float(len(calls["full"]))}, extra={}, calls=calls
        )


class PlanSampler:
    """An artifact under a plan.

    timer: the timer that watches the artifact, if any.

    Raises:
        PlanError: the artifact cannot serve the plan.
    """

    def __init__(
        self,
        deployed: DeployedPipeline,
        plan: Plan,
        *,
        seed: int,
        inputs: Inputs,
        timer: CallTimer | None = None,
    ) -> None:
        self._corrected: CorrectedPipeline = wrap(deployed, plan)
        self._deployed, self._seed, self._inputs, self._timer = deployed, seed, inputs, timer

    def sample(self, indices: range) -> Sampled:
        """Return one batch, see `Sampler.sample`."""
        with _quiet(self._deployed.pipe):
            images, seconds = _timed(self._corrected, self._inputs(indices), indices, self._seed)
        stats = self._corrected.stats
        calls = {} if self._timer is None else self._timer.take()
        return Sampled(images=images, seconds=seconds, base=stats.base, extra=stats.extra, calls=calls)


def default_inputs(indices: range) -> Mapping[str, Any]:
    """Return the arguments of an unconditional pipeline."""
    return {"batch_size": len(indices)}


def batches_of(samples: int, batch_size: int, *, first: int = 0) -> list[range]:
    """Return the indices `first` to `samples - 1` in batches; the last may be smaller."""
    starts = range(first, samples, batch_size)
    return [range(start, min(start + batch_size, samples)) for start in starts]


def generators_of(indices: range, seed: int) -> list[torch.Generator]:
    """Return a generator for each image, so that image i starts from the noise of `seed + i` in any batch."""
    return [torch.Generator().manual_seed(seed + index) for index in indices]


def _timed(
    pipeline: Callable[..., Any], arguments: Mapping[str, Any], indices: range, seed: int
) -> tuple[Tensor, float]:
    """Return images and wall-clock seconds; the copy to the CPU makes the clock wait for the device."""
    generators = generators_of(indices, seed)
    start = time.perf_counter()
    output = pipeline(**arguments, generator=generators, output_type="np")
    seconds = time.perf_counter() - start
    return from_array(output.images), seconds


@contextmanager
def _quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
