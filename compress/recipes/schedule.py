"""Which sampling steps run the whole network, and which reuse a cached feature."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from errata.errors import RecipeError

StepKind = Literal["full", "cached"]


@dataclass(frozen=True, kw_only=True)
class CacheSchedule:
    """The decision part of a feature cache (the store is `errata.compress.network.run.Run.feature`).

    `full_steps` are the denoiser calls that evaluate the whole network and refresh the feature, sorted,
    starting with 0. On every other call only the last `branch` resnets of the up path are recomputed from
    the stored feature; `branch == 0` means that there is no cache and every step is full.

    Source: DeepCache (Ma et al., CVPR 2024), section 3.2.
    """

    num_steps: int
    full_steps: tuple[int, ...]
    branch: int

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

    @classmethod
    def uncached(cls, num_steps: int) -> CacheSchedule:
        """Every step is full."""
        return cls(num_steps=num_steps, full_steps=tuple(range(num_steps)), branch=0)

    @classmethod
    def uniform(cls, num_steps: int, *, interval: int, branch: int) -> CacheSchedule:
        """Full steps at 0, N, 2N, … for the interval N."""
        if interval < 1:
            raise RecipeError(f"the cache interval must be at least 1, got {interval}")
        return cls(num_steps=num_steps, full_steps=uniform_steps(num_steps, interval=interval), branch=branch)

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """`(start, end)` of every full step with the cached ones that follow it; `end` is exclusive."""
        return tuple(zip(self.full_steps, (*self.full_steps[1:], self.num_steps), strict=True))

    @property
    def has_cache(self) -> bool:
        """Whether a full evaluation returns a feature to keep."""
        return self.branch > 0

    def kind(self, step: int) -> StepKind:
        """Kind of the denoiser call at `step`."""
        return "full" if step in self.full_steps else "cached"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; `from_json` reads it back."""
        return {"num_steps": self.num_steps, "full_steps": list(self.full_steps), "branch": self.branch}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CacheSchedule:
        """Inverse of `to_json`."""
        return cls(
            num_steps=int(value["num_steps"]),
            full_steps=tuple(int(step) for step in value["full_steps"]),
            branch=int(value["branch"]),
        )


def uniform_steps(num_steps: int, *, interval: int) -> tuple[int, ...]:
    """Every `interval`-th step: 0, N, 2N, …"""
    return tuple(range(0, num_steps, interval))


def power_law_steps(num_steps: int, *, count: int, center: float, power: float) -> tuple[int, ...]:
    """`count` full steps, dense around `center` and sparse far from it; 0 is the first.

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
