"""The loss that the networks are trained on, and the same loss on fixed held-out images.

| symbol | name here       | meaning                                             |
|--------|-----------------|-----------------------------------------------------|
| x_0    | `images`        | clean images in [-1, 1], (B, C, H, W)               |
| t      | `timesteps`     | training time, integer in [0, 1000), (B,)           |
| eps    | `noise`         | the Gaussian noise that the network learns to name  |
| x_t    | `noisy`         | sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps             |

Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", algorithm 1 (the simple loss).
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

EVALUATION_BATCH = 128
EVALUATION_SEED = 20_000  # the same noise and timesteps for every run, whatever its own seed
PARTS = 4  # equal parts of [0, 1000) whose losses are reported apart


def make_scheduler() -> DDIMScheduler:
    """Return the noise schedule of Ho et al. 2020 (linear beta, 1000 steps), sampled with DDIM.

    Nothing is clipped, so that an error of the network reaches the image instead of being hidden.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        clip_sample=False,
    )


def draw_timesteps(count: int, limit: int, generator: torch.Generator) -> Tensor:
    """Return `count` timesteps in [0, limit), int64, one from each of `count` equal strata.

    Stratifying keeps the uniform marginal and lowers the variance of the loss between batches.
    """
    position = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (position * limit).long().clamp_(max=limit - 1)


def noise_loss(
    model: Callable[..., Any],
    scheduler: DDIMScheduler,
    images: Tensor,
    generator: torch.Generator,
    *,
    mixed_precision: bool,
    channels_last: bool = True,
) -> Tensor:
    """Return the mean squared error of the predicted noise on one batch (a scalar, float32).

    images: (B, C, H, W), float32 in [-1, 1]. The generator lives on the CPU so that a seed means
    the same noise on every device.
    """
    noise = torch.randn(images.shape, generator=generator).to(images)
    timesteps = draw_timesteps(len(images), scheduler.config.num_train_timesteps, generator)
    timesteps = timesteps.to(images.device)
    noisy = scheduler.add_noise(images, noise, timesteps)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=mixed_precision):
        predicted = model(noisy.contiguous(memory_format=memory_format), timesteps).sample
    return F.mse_loss(predicted.float(), noise)


@torch.no_grad()
def held_out_loss(
    model: Callable[..., Any], scheduler: DDIMScheduler, images: Tensor, *, mixed_precision: bool
) -> dict[str, Any]:
    """Return the loss on held-out images: "loss", and "loss_by_time" of each quarter of the timesteps.

    images: (N, C, H, W), float32 in [-1, 1], N at least 4. Noise and timesteps are the same in every
    call: image i has a timestep of the i-th of N equal parts of [0, 1000).
    """
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    all_timesteps = draw_timesteps(len(images), scheduler.config.num_train_timesteps, generator)
    errors = []
    for batch, timesteps in zip(
        images.split(EVALUATION_BATCH), all_timesteps.split(EVALUATION_BATCH), strict=True
    ):
        noise = torch.randn(batch.shape, generator=generator).to(batch)
        timesteps = timesteps.to(batch.device)
        noisy = scheduler.add_noise(batch, noise, timesteps)
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=mixed_precision):
            predicted = model(noisy, timesteps).sample
        errors.append((predicted.float() - noise).square().flatten(1).mean(1))
    per_image = torch.cat(errors).cpu()
    by_time = [round(float(part.mean()), 6) for part in per_image.tensor_split(PARTS)]
    return {"loss": round(float(per_image.mean()), 6), "loss_by_time": by_time}
