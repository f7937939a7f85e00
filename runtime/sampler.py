"""The sampler that activation scales belong to, and how many denoiser calls make one of its steps.

With classifier-free guidance most pipelines call the denoiser once per sampler step, on a doubled batch. Some
call it once for each half instead, which takes half the memory: every timestep then comes twice in a row.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.errors import ArtifactMismatchError

# A timestep computed on another device may differ in its last bits (log of a sigma); two steps never do so
# little.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The sampler that the activation scales belong to.

    `timesteps` has one entry for every denoiser call; a second-order scheduler calls more often than
    `num_inference_steps` says.
    """

    scheduler_class: str
    num_inference_steps: int
    timesteps: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value; `from_json` reads it back."""
        return {
            "scheduler_class": self.scheduler_class,
            "num_inference_steps": self.num_inference_steps,
            "timesteps": list(self.timesteps),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sampler:
        """Read back what `to_json` wrote."""
        return cls(
            scheduler_class=str(value["scheduler_class"]),
            num_inference_steps=int(value["num_inference_steps"]),
            timesteps=tuple(float(time) for time in value["timesteps"]),
        )


def is_same_timestep(timestep: float, recorded: float) -> bool:
    """Return whether both mean the same step, up to rounding in single precision."""
    return math.isclose(timestep, recorded, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)


def calls_per_step(timesteps: Sequence[float]) -> int:
    """Return the largest c such that calls come in blocks of c at one timestep; 1 for most samplers.

    A sampler may come back to a timestep by itself: PNDM's `t0, t1, t1, t2, …` and Heun's
    `t0, t1, t1, t2, t2, …` have c = 1, because some timestep stands there once; the same with guidance in two
    calls, `t0, t0, t1, t1, t1, t1, …`, has c = 2. A sampler that calls twice at every timestep for another
    reason gets c = 2 as well, which keeps its predictor and its corrector apart.

    Args:
        timesteps: of every denoiser call of a run, in order; at least one.
    """
    return math.gcd(*(len(list(run)) for _, run in itertools.groupby(timesteps)))


def timesteps_at(scheduler: Any, sampler: Sampler, *, calls_per_step: int, steps: int) -> tuple[float, ...]:
    """Return the timestep of every denoiser call when the scheduler takes `steps` steps.

    Raises:
        ArtifactMismatchError: it does not take that number, or the recorded timesteps are not its own, so
            those at another number are unknown.
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


def _timesteps(scheduler: Any, steps: int, calls_per_step: int) -> tuple[float, ...]:
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError) as error:
        raise ArtifactMismatchError(
            f"num_inference_steps={steps!r}: {error}; choose another number"
        ) from error
    return tuple(float(time) for time in scheduler.timesteps for _ in range(calls_per_step))
