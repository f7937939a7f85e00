"""Choices of feature caching: which steps are full, what a cached one recomputes, how reuse is corrected.

Steps are sampler steps here, also where a pipeline calls its denoiser several times in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any, ClassVar, Literal

from errata.errors import RecipeError
from errata.runtime.recipes.quantization import known_fields
from errata.runtime.schedule import CacheSchedule, calls_of, power_law_steps, uniform_steps

# DeepCache's setting for Stable Diffusion (Ma et al., CVPR 2024).
_POWER = 1.4


@dataclass(frozen=True, kw_only=True)
class DeepCache:
    """Feature caching: some steps are full, the others recompute the last `branch` resnets of the up path.

    Attributes:
        interval: N; one sampler step in N is full. None with explicit `steps`.
        branch: resnets that a cached step recomputes, counted from the end; None stands for the papers'
            setting, the last 3 for pixel-space models and the last 1 for latent ones.
        spacing: `"uniform"` (0, N, 2N, …) or `"power"`, dense around `center` and sparse far from it.
        center: step around which a power law is dense; None stands for the middle of the run.
        power: exponent of the power law, above 1.
        steps: the full sampler steps themselves.

    Source: DeepCache (Ma et al., CVPR 2024), sections 3.2 and 3.3.
    """

    interval: int | None = None
    branch: int | None = None
    spacing: Literal["uniform", "power"] = "uniform"
    center: float | None = None
    power: float = _POWER
    steps: tuple[int, ...] | None = None

    method: ClassVar[str] = "deepcache"

    def __post_init__(self) -> None:
        if (self.interval is None) == (self.steps is None):
            raise RecipeError("a cache needs either an interval, as in deepcache-5, or a list of full steps")
        check_numbers(self.interval, self.branch)
        if self.spacing not in ("uniform", "power"):
            raise RecipeError(f"spacing={self.spacing!r} is unknown; allowed are uniform and power")
        if self.spacing == "power" and self.steps is not None:
            raise RecipeError("give either explicit steps or spacing=power, not both")
        if not (type(self.power) in (int, float) and 1 < self.power <= 10):
            raise RecipeError(f"power={self.power!r}; allowed are numbers above 1, at most 10")
        if self.spacing == "uniform":
            self._check_options()
        if self.center is not None and not (type(self.center) in (int, float) and self.center >= 0):
            raise RecipeError(f"center={self.center!r}; allowed are step numbers from 0")
        if self.steps is not None:
            object.__setattr__(self, "steps", checked_steps(self.steps))

    def _check_options(self) -> None:
        for name, default in (("center", None), ("power", _POWER)):
            if (value := getattr(self, name)) != default:
                raise RecipeError(f"{name}={value!r} has no effect without spacing=power")

    def schedule(self, num_calls: int, *, branch: int, calls_per_step: int = 1) -> CacheSchedule:
        """Return the schedule of a run of that many denoiser calls, `calls_per_step` in each sampler step.

        Raises:
            RecipeError: a listed step or the centre lies beyond the run.
        """
        full_steps = self._full_steps(num_calls // calls_per_step, calls_per_step)
        return CacheSchedule(
            num_steps=num_calls,
            full_steps=calls_of(full_steps, calls_per_step=calls_per_step),
            branch=branch,
            calls_per_step=calls_per_step,
        )

    def _full_steps(self, num_steps: int, calls_per_step: int) -> tuple[int, ...]:
        """Return the full ones of `num_steps` sampler steps."""
        if self.steps is not None:
            if self.steps[-1] >= num_steps:
                unit = f" of sampler steps, {calls_per_step} denoiser calls each" * (calls_per_step > 1)
                raise RecipeError(
                    f"step {self.steps[-1]} is beyond the run{unit}; its last step is {num_steps - 1}; leave "
                    "it out, or calibrate with more steps"
                )
            return self.steps
        assert self.interval is not None
        if self.spacing == "uniform":
            return uniform_steps(num_steps, interval=self.interval)
        center = num_steps / 2 if self.center is None else float(self.center)
        return power_law_steps(
            num_steps, count=ceil(num_steps / self.interval), center=center, power=self.power
        )

    def allows(self, schedule: CacheSchedule) -> bool:
        """Return whether the schedule is the one that these choices mean."""
        return schedule == self.schedule(
            schedule.num_steps, branch=schedule.branch, calls_per_step=schedule.calls_per_step
        )

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        value = {"method": self.method, **asdict(self)}
        return value | {"steps": None if self.steps is None else list(self.steps)}


@dataclass(frozen=True, kw_only=True)
class CacheQuant:
    """Feature caching with a searched schedule and corrected reuse.

    Attributes:
        interval: N; ⌈T/N⌉ of T sampler steps are full.
        branch: as in `DeepCache`.
        search: `"dps"` searches the schedule by dynamic programming; `"uniform"` takes every N-th step.
        correction: whether the reused feature, and the layer that reads it, are corrected channel by channel
            (DEC).
        gain: how the reused feature is scaled: `"spread"` gives every channel the mean and the standard
            deviation that it has in full passes; `"least_squares"`, the source's choice, comes nearest on
            average, and shrinks what it cannot predict.
        corrected_by: `"iec"` fits that correction on what Iterative Error Correction with replacement leaves
            in the cache; None on what a plain run leaves there.

    Source: CacheQuant (Liu et al., CVPR 2025), sections 3.2 (DPS) and 3.3 (DEC).
    """

    interval: int
    branch: int | None = None
    search: Literal["dps", "uniform"] = "dps"
    correction: bool = True
    gain: Literal["spread", "least_squares"] = "spread"
    corrected_by: Literal["iec"] | None = None

    method: ClassVar[str] = "cachequant"

    def __post_init__(self) -> None:
        check_numbers(self.interval, self.branch)
        if self.search not in ("dps", "uniform"):
            raise RecipeError(f"search={self.search!r} is unknown; allowed are dps and uniform")
        if type(self.correction) is not bool:
            raise RecipeError(f"correction={self.correction!r}; allowed are true and false")
        if self.gain not in ("spread", "least_squares"):
            raise RecipeError(f"gain={self.gain!r} is unknown; allowed are spread and least_squares")
        if self.gain != "spread" and not self.correction:
            raise RecipeError(f"gain={self.gain} has no effect with correction=false; leave one of them out")
        if self.corrected_by not in (None, "iec"):
            raise RecipeError(f"corrected_by={self.corrected_by!r} is unknown; allowed is iec, or nothing")
        if self.corrected_by is not None and not self.correction:
            raise RecipeError("corrected_by=iec has no effect with correction=false; leave one of them out")

    def allows(self, schedule: CacheSchedule) -> bool:
        """Return whether a search could have found the schedule: number and lengths of its groups."""
        num_steps = schedule.num_steps // schedule.calls_per_step
        lengths = [(end - start) // schedule.calls_per_step for start, end in schedule.groups]
        starts = tuple(start // schedule.calls_per_step for start, _ in schedule.groups)
        if starts == uniform_steps(num_steps, interval=self.interval):
            return True
        if self.search == "uniform":
            return False
        low, high = group_lengths(self.interval)
        is_count_right = len(lengths) == ceil(num_steps / self.interval)
        return is_count_right and all(low <= length <= high for length in lengths)

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {"method": self.method, **asdict(self)}


Cache = DeepCache | CacheQuant


def cache_from_json(value: Mapping[str, Any]) -> Cache:
    """Read back what `to_json` of either wrote.

    Raises:
        RecipeError: an unknown method or key.
        TypeError: a missing key.
    """
    fields = dict(value)
    method = fields.pop("method", None)
    if method == DeepCache.method:
        fields = known_fields(DeepCache, fields)
        steps = fields.get("steps")
        return DeepCache(**{**fields, "steps": None if steps is None else tuple(steps)})
    if method == CacheQuant.method:
        return CacheQuant(**known_fields(CacheQuant, fields))
    raise RecipeError(f"cache method {method!r} is unknown; allowed are deepcache and cachequant")


def group_lengths(interval: int) -> tuple[int, int]:
    """Return the fewest and most steps of a searched group, the full one included: `⌈N/2⌉` and `2N`.

    Source: CacheQuant (Liu et al., CVPR 2025), section 3.2.
    """
    return ceil(interval / 2), 2 * interval


def check_numbers(interval: int | None, branch: int | None) -> None:
    """Check that interval and branch are counts.

    Raises:
        RecipeError: naming it.
    """
    if interval is not None and (type(interval) is not int or interval < 1):
        raise RecipeError(f"the cache interval must be a whole number, at least 1, got {interval!r}")
    if branch is not None and (type(branch) is not int or branch < 1):
        raise RecipeError(f"branch={branch!r}: a cached step must recompute at least 1 resnet")


def checked_steps(steps: Any) -> tuple[int, ...]:
    """Return a sorted tuple of full steps, 0 among them.

    Raises:
        RecipeError: not a list of different step numbers from 0.
    """
    listed = list(steps) if isinstance(steps, list | tuple) else None
    if not listed or not all(type(step) is int and step >= 0 for step in listed):
        raise RecipeError(f"steps={steps!r}; allowed is a list of step numbers from 0")
    if len(set(listed)) != len(listed) or 0 not in listed:
        raise RecipeError(f"steps={listed!r}; full steps must be different from each other and include 0")
    return tuple(sorted(listed))
