"""The first denoiser calls of a pipeline's run: what they take, and what a whole run will record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline

from errata.calibration.pipelines import run_batch
from errata.calibration.recorder import Recorder, Trajectory
from errata.memory import MemoryMeter

# Calls that are timed, and the seconds after which no third one is begun.
_MOST_CALLS, _SECONDS = 8, 0.5
# The first call of a process takes up to a second more than those that follow: unless it took so long, there
# is a second one.
_LONG = 5.0


@dataclass(frozen=True, kw_only=True)
class FirstCalls:
    """What was seen of one run.

    Attributes:
        num_samples: samples in the batch.
        before: seconds from the start of the run to its first call, as for encoding texts.
        seconds: from one call to the next.
        growth: bytes that memory grew by during the first call; None if that is not known.
        trajectory: the calls that were run.
        timesteps: of all calls of a run, as the scheduler plans them.
    """

    num_samples: int
    before: float
    seconds: float
    growth: int | None
    trajectory: Trajectory
    timesteps: tuple[float, ...]


class _SeenEnoughError(Exception):
    """Ends a run of the pipeline from inside its network."""


class _Watch:
    """Notes when calls begin, and stops the run after some."""

    def __init__(self, pipe: DiffusionPipeline, meter: MemoryMeter) -> None:
        self._pipe, self._meter = pipe, meter
        self.times: list[float] = []
        self.planned: list[float] = []
        self.growth: int | None = None

    def on_call(self) -> None:
        """Take note of a call that begins."""
        if self._pipe.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.planned = _planned(self._pipe.scheduler)
            self._meter.restart()
        elif len(self.times) == 2:
            self.growth = self._meter.growth()
        elapsed = self.times[-1] - self.times[0]
        if len(self.times) > _MOST_CALLS or elapsed > (_LONG if len(self.times) < 3 else _SECONDS):
            raise _SeenEnoughError


def first_calls(
    pipe: DiffusionPipeline,
    meter: MemoryMeter,
    *,
    seeds: Sequence[int],
    num_inference_steps: int,
    guidance_scale: float | None,
    prompts: Sequence[str] | None,
    inputs: Mapping[str, Any] | None,
    call: Callable[..., Any] | None = None,
) -> FirstCalls:
    """Begin a run of the pipeline, and stop after one call, or a few short ones.

    Raises:
        CalibrationError: the run would be refused.
    """
    watch = _Watch(pipe, meter)
    start = time.perf_counter()
    with Recorder(pipe.unet, on_call=watch.on_call) as recorder, suppress(_SeenEnoughError):
        run_batch(
            pipe,
            seeds=seeds,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            prompts=prompts,
            inputs=inputs,
            call=call,
        )
    trajectory = recorder.trajectory()
    if watch.times[-1] == watch.times[0]:  # it was the only one
        watch.times.append(time.perf_counter())
        watch.growth = meter.growth()
    taken = [after - begun for begun, after in zip(watch.times, watch.times[1:], strict=False)]
    return FirstCalls(
        num_samples=len(seeds),
        before=watch.times[0] - start,
        seconds=median(taken[1:] or taken),
        growth=watch.growth,
        trajectory=trajectory,
        timesteps=_whole_run(watch.planned, trajectory.timestep.tolist()),
    )


def _planned(scheduler: Any) -> list[float]:
    timesteps = getattr(scheduler, "timesteps", ())
    return list(timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps)


def _whole_run(planned: list[float], seen: list[float]) -> tuple[float, ...]:
    """Return the timesteps of all calls, from what the scheduler plans and the first calls.

    A run may start in the middle, and may call twice at each timestep. Where the network gets something else
    than the scheduler's timesteps, their number counts.
    """
    if seen[0] in planned:
        planned = planned[planned.index(seen[0]) :]
    if len(seen) == 1 or not planned:
        return tuple(planned or seen)
    is_twice = seen[1] == seen[0] and planned[:2] != seen[:2]
    return tuple(step for step in planned for _ in range(1 + is_twice))
