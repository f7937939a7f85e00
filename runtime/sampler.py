"""The sampler that activation scales belong to, and how many denoiser calls make one of its steps.

With classifier-free guidance most pipelines call the denoiser once per sampler step, on a doubled batch. Some
call it once for each half instead, which takes half the memory: every timestep then comes twice in a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


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
        """Plain JSON value; `from_json` reads it back."""
        return {
            "scheduler_class": self.scheduler_class,
            "num_inference_steps": self.num_inference_steps,
            "timesteps": list(self.timesteps),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Sampler:
        """Inverse of `to_json`."""
        return cls(
            scheduler_class=str(value["scheduler_class"]),
            num_inference_steps=int(value["num_inference_steps"]),
            timesteps=tuple(float(time) for time in value["timesteps"]),
        )


def calls_per_step(timesteps: Sequence[float]) -> int:
    """The largest c such that the calls fall into blocks of c in a row at one timestep; 1 for most samplers.

    A sampler may come back to a timestep by itself: PNDM's `t0, t1, t1, t2, …` and Heun's
    `t0, t1, t1, t2, t2, …` have c = 1, because some timestep stands there once; the same with guidance in two
    calls, `t0, t0, t1, t1, t1, t1, …`, has c = 2. A sampler that calls twice at every timestep for another
    reason gets c = 2 as well, which keeps its predictor and its corrector apart.

    Args:
        timesteps: of every denoiser call of a run, in order; at least one.
    """
    return math.gcd(*(len(list(run)) for _, run in itertools.groupby(timesteps)))
