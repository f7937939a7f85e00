"""The latent upscaler, which tells its network another timestep, and preconditions what comes back.

Every other pipeline passes the scheduler's timestep on, and takes the network's output as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

from diffusers import StableDiffusionLatentUpscalePipeline
from torch import Tensor

from errata.runtime.unet_arguments import is_same_timestep

Read = Callable[[Tensor, Tensor, int], Tensor]
"""Makes a part of the prediction from the network's output for it, the unscaled samples, and the index of the
denoiser call."""


def scheduler_timesteps(
    pipe: Any, timesteps: tuple[float, ...], *, num_inference_steps: int
) -> tuple[float, ...]:
    """Return the scheduler's timesteps at the recorded `timesteps` of the network's calls.

    They are the same, except for the latent upscaler, which passes log(σ) / 4 to its network. Timesteps that
    are not recognised are returned as they are.
    """
    if not isinstance(pipe, StableDiffusionLatentUpscalePipeline):
        return timesteps
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(num_inference_steps)
    own = tuple(float(t) for t in scheduler.timesteps)
    told = [math.log(sigma) / 4 for sigma in scheduler.sigmas[: len(own)].tolist()]
    is_same = len(own) == len(timesteps) and all(map(is_same_timestep, told, timesteps))
    return own if is_same else timesteps


def is_timestep_passed_on(pipe: Any) -> bool:
    """Return whether network and scheduler get the same timestep; the latent upscaler's do not."""
    return not isinstance(pipe, StableDiffusionLatentUpscalePipeline)


def reader_of(pipe: Any) -> Read:
    """Return how the pipeline reads its network's output."""
    if isinstance(pipe, StableDiffusionLatentUpscalePipeline):
        return _preconditioned(pipe.scheduler.sigmas)
    return _as_it_is


def _as_it_is(raw: Tensor, samples: Tensor, step: int) -> Tensor:
    return raw


def _preconditioned(sigmas: Tensor) -> Read:
    """Return how to read the latent upscaler: drop the last channel, then Karras et al. (2022), table 1."""

    def read(raw: Tensor, samples: Tensor, step: int) -> Tensor:
        sigma = sigmas[step]
        # Rounded as the pipeline does: guidance would amplify any other rounding in half precision.
        return 1 / (sigma**2 + 1) * samples + sigma / (sigma**2 + 1).sqrt() * raw[:, :-1]

    return read
