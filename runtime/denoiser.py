"""The denoiser protocol: what runs, and what every corrector, check and exported engine shares."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from errata.runtime.feature_correction import FeatureCorrection
from errata.runtime.output_map import OutputMap
from errata.runtime.schedule import CacheSchedule, StepKind
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

Conditioning = Mapping[str, Tensor]

# Calls timed per kind; their median is quoted.
_TIMED_CALLS = 5
_WARM_UP_CALLS = 2


class Denoiser(Protocol):
    """An evaluator of the noise prediction at a recorded sampling step.

    `x` is the network input `(B, C, H, W)`, `step` the index of the call in the recorded schedule (it picks
    the activation scales), `cond` the network's other tensor arguments (empty for an unconditional model).

    What a call returns is the caller's to keep. A denoiser that writes every answer into the same memory, as
    replayed CUDA graphs do (`torch.compile(mode="reduce-overhead")` among them), has an attribute
    `reuses_outputs` that is true; whoever gets it from a pipeline then gets copies (`CopyingDenoiser`).
    """

    @property
    def schedule(self) -> CacheSchedule:
        """Which steps a plain run evaluates in full."""

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Training time of every recorded call."""

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Return the prediction `(B, C, H, W)` and the feature for cached calls (None without a cache)."""

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        """Return the prediction from the shallow branch and a feature.

        The feature is one that a full call left, or made of several: then the part of an error correction
        that was fitted for plain reuse does not apply.
        """

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        """Return the measured seconds of one call of that kind at the latest shape, or at `batch_size`."""


class WrappedDenoiser:
    """A `Denoiser` that passes its calls on to another one: the base of those that change something.

    Attributes:
        denoiser: the one inside.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    @property
    def schedule(self) -> CacheSchedule:
        """See `Denoiser.schedule`."""
        return self.denoiser.schedule

    @property
    def timesteps(self) -> tuple[float, ...]:
        """See `Denoiser.timesteps`."""
        return self.denoiser.timesteps

    def corrected(
        self, prediction: Tensor, x: Tensor, step: int, kind: StepKind, cond: Conditioning
    ) -> Tensor:
        """Return what becomes of a prediction, `(B, C, H, W)`; here the prediction itself."""
        return prediction

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """See `Denoiser.full`."""
        prediction, feature = self.denoiser.full(x, step, cond)
        return self.corrected(prediction, x, step, "full", cond), feature

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        """See `Denoiser.cached`."""
        prediction = self.denoiser.cached(x, step, cond, feature, is_extrapolated=is_extrapolated)
        return self.corrected(prediction, x, step, "cached", cond)

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        """See `Denoiser.cost`."""
        return self.denoiser.cost(kind, batch_size=batch_size)


class UNetDenoiser:
    """A `Denoiser` over a diffusers UNet whose quantized layers read `context`.

    A cached call reads a stored feature through `correction`, where there is one. Calls from several threads
    wait for each other.

    Args:
        unet: the network.
        context: what its layers read.
        schedule: of the calls of a run.
        timesteps: of those calls.
        correction: of the feature that cached calls read.
        output_map: of every prediction.
        ranges_of: for each call, the recorded step whose ranges and corrections it takes; None is its own.

    Attributes:
        reuses_outputs: see `Denoiser`; to be set by whoever makes the network inside replay CUDA graphs.
    """

    reuses_outputs: bool = False

    def __init__(
        self,
        unet: BranchedUNet,
        context: StepContext,
        schedule: CacheSchedule,
        timesteps: tuple[float, ...],
        *,
        correction: FeatureCorrection | None = None,
        output_map: OutputMap | None = None,
        ranges_of: tuple[int, ...] | None = None,
    ) -> None:
        if len(timesteps) != schedule.num_steps:
            raise ValueError(f"{len(timesteps)} timesteps for a schedule of {schedule.num_steps} steps")
        self._unet = unet
        self._context = context
        self._schedule = schedule
        self._timesteps = timesteps
        self._correction = correction
        self._output_map = output_map
        self._ranges_of = ranges_of
        self._latest: tuple[torch.Size, torch.dtype, torch.device, dict[str, Tensor]] | None = None
        self._costs: dict[tuple[StepKind, tuple[int, ...]], float] = {}

    @property
    def schedule(self) -> CacheSchedule:
        """Which steps a plain run evaluates in full."""
        return self._schedule

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Training time of every recorded call."""
        return self._timesteps

    @property
    def unet(self) -> BranchedUNet:
        """The network, evaluated in full or by its shallow branch."""
        return self._unet

    @torch.no_grad()
    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """See `Denoiser.full`."""
        timestep = self._timestep(step)
        with self._context.at(self._ranges(step), time=timestep):
            self._latest = (x.shape, x.dtype, x.device, dict(cond))
            prediction, feature = self._unet.full(x, timestep, cond, branch=self._schedule.branch)
        return self._mapped(prediction, step, "full"), feature

    @torch.no_grad()
    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        """See `Denoiser.cached`.

        Raises:
            ValueError: the model has no cache, or the feature belongs to another batch.
        """
        if not self._schedule.has_cache:
            raise ValueError("this model has no feature cache: every step is a full one")
        if feature.shape[0] != x.shape[0]:
            raise ValueError(f"the cached feature holds {feature.shape[0]} samples, the input {x.shape[0]}")
        timestep = self._timestep(step)
        if self._correction is not None and not is_extrapolated:
            feature = self._correction(feature, self._ranges(step))
        with self._context.at(self._ranges(step), kind="cached", time=timestep):
            self._latest = (x.shape, x.dtype, x.device, dict(cond))
            prediction = self._unet.cached(x, timestep, cond, feature, branch=self._schedule.branch)
        return self._mapped(prediction, step, "cached")

    def at(
        self, schedule: CacheSchedule, timesteps: tuple[float, ...], ranges_of: tuple[int, ...]
    ) -> UNetDenoiser:
        """Return the same network at other calls; see the class for the arguments."""
        return UNetDenoiser(
            self._unet,
            self._context,
            schedule,
            timesteps,
            correction=self._correction,
            output_map=self._output_map,
            ranges_of=ranges_of,
        )

    def _mapped(self, prediction: Tensor, step: int, kind: StepKind) -> Tensor:
        if self._output_map is None:
            return prediction
        return self._output_map(prediction, self._ranges(step), kind)

    def _ranges(self, step: int) -> int:
        return step if self._ranges_of is None else self._ranges_of[step]

    def _timestep(self, step: int) -> float:
        if not 0 <= step < self._schedule.num_steps:
            raise ValueError(f"step {step} was not recorded; allowed are 0 to {self._schedule.num_steps - 1}")
        return self._timesteps[step]

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        """See `Denoiser.cost`; measured once per shape, kept for the life of the denoiser.

        Both kinds are timed in turn, so a drift of the machine's speed cancels in their ratio.

        Raises:
            ValueError: no call has been made yet, so no shape is known; or there are no cached calls.
        """
        check_measurable(kind, self._schedule, has_shape=self._latest is not None)
        assert self._latest is not None
        shape, dtype, device, cond = self._latest
        if batch_size is not None and batch_size != shape[0]:
            cond = {name: _resized(value, shape[0], batch_size) for name, value in cond.items()}
            shape = torch.Size((batch_size, *shape[1:]))
        if (kind, tuple(shape)) not in self._costs:
            latest = self._latest
            # A generator of its own: torch's stays as it is.
            noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            seconds = measured_costs(self, noise.to(device, dtype), cond)
            self._costs |= {(each, tuple(shape)): value for each, value in seconds.items()}
            self._latest = latest
        return self._costs[kind, tuple(shape)]


def check_measurable(kind: StepKind, schedule: CacheSchedule, *, has_shape: bool) -> None:
    """Check that a kind of call can be timed.

    Raises:
        ValueError: no call has been made yet, so no shape is known; or there are no cached calls.
    """
    if kind == "cached" and not schedule.has_cache:
        raise ValueError("this model has no feature cache: there is no cached call to measure")
    if not has_shape:
        raise ValueError("run the pipeline once before asking for a cost: its input shape is not known yet")


def measured_costs(denoiser: Denoiser, x: Tensor, cond: Conditioning) -> dict[StepKind, float]:
    """Return the median seconds of each kind of call that the denoiser has, at step 0.

    Both kinds are timed in turn, so a drift of the machine's speed cancels in their ratio.
    """
    _, feature = denoiser.full(x, 0, cond)
    calls: dict[StepKind, Callable[[], object]] = {"full": lambda: denoiser.full(x, 0, cond)}
    if feature is not None:
        calls["cached"] = lambda: denoiser.cached(x, 0, cond, feature)
    seconds: dict[StepKind, list[float]] = {kind: [] for kind in calls}
    for turn in range(_WARM_UP_CALLS + _TIMED_CALLS):
        for kind, call in calls.items():
            start = _now(x.device)
            call()
            if turn >= _WARM_UP_CALLS:
                seconds[kind].append(_now(x.device) - start)
    return {kind: statistics.median(times) for kind, times in seconds.items()}


def _resized(value: Tensor, rows: int, batch_size: int) -> Tensor:
    """Return the conditioning for another batch size; what is not one entry per row stays as it is."""
    if value.ndim == 0 or value.shape[0] != rows:
        return value
    return value[:1].expand(batch_size, *value.shape[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
