"""Another number of sampling steps than recorded: calls take the ranges of the nearest recorded step."""

from __future__ import annotations

import copy
from typing import Any

from errata.errors import ArtifactMismatchError
from errata.runtime.sampler import Sampler
from errata.runtime.schedule import CacheSchedule, calls_of
from errata.runtime.unet_arguments import is_same_timestep


def timesteps_at(scheduler: Any, sampler: Sampler, *, calls_per_step: int, steps: int) -> tuple[float, ...]:
    """The timestep of every denoiser call when the scheduler takes `steps` steps.

    Raises:
        ArtifactMismatch: it takes no such number, or what was recorded are not its own timesteps, so nobody
            knows which they would be at another number.
    """
    recorded = _timesteps(scheduler, sampler.num_inference_steps, calls_per_step)
    is_own = len(recorded) == len(sampler.timesteps) and all(
        map(is_same_timestep, recorded, sampler.timesteps)
    )
    if not is_own:
        raise ArtifactMismatchError(
            f"the recorded timesteps are not those of {type(scheduler).__name__} at "
            f"{sampler.num_inference_steps} steps (it was replaced, or the pipeline starts in the middle), "
            f"so none are known for {steps}; sample with the recorded number of steps"
        )
    return _timesteps(scheduler, steps, calls_per_step)


def nearest_steps(
    timesteps: tuple[float, ...], recorded: tuple[float, ...], *, calls_per_step: int
) -> tuple[int, ...]:
    """For every call the recorded one of the same stream that is nearest in time, the earlier one of two."""
    starts = range(0, len(recorded), calls_per_step)
    return tuple(
        min(starts, key=lambda start: abs(recorded[start] - time)) + call % calls_per_step
        for call, time in enumerate(timesteps)
    )


def schedule_at(schedule: CacheSchedule, ranges_of: tuple[int, ...]) -> CacheSchedule:
    """The cache schedule of calls that take the ranges of these recorded ones.

    As recorded, the feature is refreshed where an interval begins: by the first call in each of them.
    """
    calls = schedule.calls_per_step
    if not schedule.has_cache:
        return CacheSchedule.uncached(len(ranges_of), calls_per_step=calls)
    starts = schedule.full_steps[::calls]
    intervals = [sum(start <= step for start in starts) for step in ranges_of[::calls]]
    full = [
        place for place, interval in enumerate(intervals) if place == 0 or interval != intervals[place - 1]
    ]
    return CacheSchedule(
        num_steps=len(ranges_of),
        full_steps=calls_of(full, calls_per_step=calls),
        branch=schedule.branch,
        calls_per_step=calls,
    )


def _timesteps(scheduler: Any, steps: int, calls_per_step: int) -> tuple[float, ...]:
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError) as error:
        raise ArtifactMismatchError(
            f"num_inference_steps={steps!r}: {error}; choose another number"
        ) from error
    return tuple(float(time) for time in scheduler.timesteps for _ in range(calls_per_step))
