"""Which denoiser calls run the whole network, and which reuse a cached feature.

Most pipelines call the denoiser once per sampler step, with guidance on a doubled batch. Some call it once
for each half of the guidance instead. The calls of a sampler step then belong to as many streams, and a
cached call may only reuse a feature of its own stream: that of another one was made from another condition.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from errata.errors import RecipeError

StepKind = Literal["full", "cached"]


@dataclass(frozen=True, kw_only=True)
class CacheSchedule:
    """When a feature cache is refreshed and when it is read; `errata.runtime.run.Run` stores the features.

    `full_steps` are the denoiser calls that evaluate the whole network and refresh the feature, sorted,
    starting with 0. On every other call only the last `branch` resnets of the up path are recomputed from
    the stored feature; `branch == 0` means that there is no cache and every step is full.

    `num_steps` counts denoiser calls, and so do all step numbers here. `calls_per_step` of them, in a row,
    make a sampler step; those are full together, or cached together, and each belongs to another stream
    that keeps a feature of its own.

    Source: DeepCache (Ma et al., CVPR 2024), section 3.2.
    """

    num_steps: int
    full_steps: tuple[int, ...]
    branch: int
    calls_per_step: int = 1

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise RecipeError(f"a schedule needs at least one step, got num_steps={self.num_steps}")
        if not self.full_steps or self.full_steps[0] != 0:
            raise RecipeError(f"step 0 must be a full step, got full_steps={self.full_steps}")
        if list(self.full_steps) != sorted(set(self.full_steps)) or self.full_steps[-1] >= self.num_steps:
            raise RecipeError(
                f"full_steps must be sorted, unique and below {self.num_steps}, got {self.full_steps}"
            )
        if self.branch < 0 or (self.branch == 0 and len(self.full_steps) != self.num_steps):
            raise RecipeError(f"branch={self.branch} cannot serve cached steps; use 1 or more")
        self._check_whole_steps()

    def _check_whole_steps(self) -> None:
        """Check that the calls of a sampler step are of one kind; else a stream had no feature to read."""
        per_step = self.calls_per_step
        if type(per_step) is not int or per_step < 1:
            raise RecipeError(f"calls_per_step={per_step!r}; allowed are whole numbers of at least 1")
        if self.num_steps % per_step:
            raise RecipeError(
                f"{self.num_steps} denoiser calls do not make whole sampler steps with "
                f"calls_per_step={per_step}; give a multiple of it"
            )
        whole = calls_of({call // per_step for call in self.full_steps}, calls_per_step=per_step)
        if missing := sorted(set(whole) - set(self.full_steps)):
            raise RecipeError(
                f"full_steps={self.full_steps} leaves out call {missing[0]}, but the {per_step} calls of a "
                "sampler step are full together; list all of them or none"
            )

    @classmethod
    def uncached(cls, num_steps: int, *, calls_per_step: int = 1) -> CacheSchedule:
        """Return a schedule in which every step is full."""
        return cls(
            num_steps=num_steps,
            full_steps=tuple(range(num_steps)),
            branch=0,
            calls_per_step=calls_per_step,
        )

    @classmethod
    def uniform(cls, num_steps: int, *, interval: int, branch: int, calls_per_step: int = 1) -> CacheSchedule:
        """Return one with sampler steps 0, N, 2N, … full; `num_steps` counts denoiser calls."""
        if interval < 1:
            raise RecipeError(f"the cache interval must be at least 1, got {interval}")
        full_steps = uniform_steps(num_steps // calls_per_step, interval=interval)
        return cls(
            num_steps=num_steps,
            full_steps=calls_of(full_steps, calls_per_step=calls_per_step),
            branch=branch,
            calls_per_step=calls_per_step,
        )

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """The cache intervals: `(start, end)` of every full sampler step with the cached ones after it.

        They count denoiser calls, and `end` is exclusive. Calls `start` to `start + calls_per_step - 1` are
        full, the rest is cached.
        """
        starts = self.full_steps[:: self.calls_per_step]
        return tuple(zip(starts, (*starts[1:], self.num_steps), strict=True))

    @property
    def has_cache(self) -> bool:
        """Whether a full evaluation returns a feature to keep."""
        return self.branch > 0

    def kind(self, step: int) -> StepKind:
        """Return the kind of the denoiser call at `step`."""
        return "full" if step in self.full_steps else "cached"

    def stream(self, step: int) -> int:
        """Return which of the features in turn the denoiser call at `step` stores or reads, from 0."""
        return step % self.calls_per_step

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value for `from_json`; `calls_per_step` is left out where it is 1."""
        value = {"num_steps": self.num_steps, "full_steps": list(self.full_steps), "branch": self.branch}
        return value if self.calls_per_step == 1 else {**value, "calls_per_step": self.calls_per_step}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CacheSchedule:
        """Read back what `to_json` wrote."""
        return cls(
            num_steps=int(value["num_steps"]),
            full_steps=tuple(int(step) for step in value["full_steps"]),
            branch=int(value["branch"]),
            calls_per_step=value.get("calls_per_step", 1),
        )


def calls_of(sampler_steps: Iterable[int], *, calls_per_step: int) -> tuple[int, ...]:
    """Return the denoiser calls of these sampler steps, sorted."""
    return tuple(
        step * calls_per_step + stream for step in sorted(sampler_steps) for stream in range(calls_per_step)
    )


def uniform_steps(num_steps: int, *, interval: int) -> tuple[int, ...]:
    """Return every `interval`-th step: 0, N, 2N, …"""
    return tuple(range(0, num_steps, interval))


def power_law_steps(num_steps: int, *, count: int, center: float, power: float) -> tuple[int, ...]:
    """Return `count` full steps, dense around `center` and sparse far from it; 0 is the first.

    Equally spaced numbers `u` are mapped to `center + sign(u) |u|^power`, and the ends of their range to the
    ends of the run. Where two of them meet in one step, the power is lowered until none do.

    Args:
        num_steps: T.
        count: at most T.
        center: in `[0, T]`.
        power: above 1.

    Raises:
        RecipeError: the centre lies beyond the run.

    Source: DeepCache (Ma et al., CVPR 2024), section 3.3, non-uniform 1:N strategy.
    """
    if not 0 <= center <= num_steps:
        raise RecipeError(f"center={center:g} is beyond the run; allowed are 0 to {num_steps}")
    exponent = power
    while True:
        steps = _power_law(num_steps, count, center, exponent)
        if len(steps) == count or exponent == 1.0:
            return steps
        exponent = max(1.0, exponent - 0.02)


def _power_law(num_steps: int, count: int, center: float, power: float) -> tuple[int, ...]:
    first, last = -(center ** (1 / power)), (num_steps - center) ** (1 / power)
    spread = [first + (last - first) * position / count for position in range(1, count)]
    # Rounded before it is cut: a whole number must not fall to the one below by the last bit.
    inner = {int(round(center + math.copysign(abs(u) ** power, u), 9)) for u in spread}
    return tuple(sorted({0} | {min(step, num_steps - 1) for step in inner}))


def nearest_steps(
    timesteps: tuple[float, ...], recorded: tuple[float, ...], *, calls_per_step: int
) -> tuple[int, ...]:
    """Return for every call the recorded one of its stream that is nearest in time, the earlier of two."""
    starts = range(0, len(recorded), calls_per_step)
    return tuple(
        min(starts, key=lambda start: abs(recorded[start] - time)) + call % calls_per_step
        for call, time in enumerate(timesteps)
    )


def schedule_at(schedule: CacheSchedule, ranges_of: tuple[int, ...]) -> CacheSchedule:
    """Return the cache schedule of calls that take the ranges of these recorded ones.

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
