"""Sample an artifact with its cached steps served in any way: by weights of the stored features.

The loop is that of an unconditional pipeline; with plain reuse its images equal the pipeline's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from errata.correct.sampling import batches_of, generators_of
from errata.deploy import DeployedPipeline

MEASURED = 10_000_000  # seed of the images that are measured
TUNED = 30_000_000  # and of those that thresholds and tables are made from
BATCH_SIZE = 32


@dataclass
class State:
    """One run so far: sample and prediction of every step, and `(step, feature)` of every full call."""

    samples: list[Tensor] = field(default_factory=list)
    predictions: list[Tensor] = field(default_factory=list)
    stored: list[tuple[int, Tensor]] = field(default_factory=list)


Weights = Callable[[Sequence[int], int], Sequence[float]]
"""Weights of the stored features, of which the steps are given, for the feature of a step."""

IsFull = Callable[[int, Tensor, State], bool]
"""Whether a step is evaluated in full, given its sample and the run so far."""


def reuse(known: Sequence[int], step: int) -> list[float]:
    """Return the weights of the latest feature as it is."""
    return [0.0] * (len(known) - 1) + [1.0]


def linear(known: Sequence[int], step: int) -> list[float]:
    """Return the weights of `Forecast(order=1)`."""
    if len(known) < 2:
        return reuse(known, step)
    ahead = (step - known[-1]) / (known[-1] - known[-2])
    return [0.0] * (len(known) - 2) + [-ahead, 1 + ahead]


def at(steps: Sequence[int]) -> IsFull:
    """Return a fixed schedule."""
    chosen = frozenset(steps)
    return lambda step, sample, state: step in chosen


@torch.no_grad()
def images(
    deployed: DeployedPipeline,
    is_full: IsFull,
    weights: Weights,
    count: int,
    *,
    seed: int = MEASURED,
    full: list[int] | None = None,
) -> Tensor:
    """Return images `(count, C, H, W)`; `full` gets the number of full calls of each batch."""
    made = []
    for batch in batches_of(count, BATCH_SIZE):
        state, sample = State(), noise(deployed, batch, seed)
        scheduler = scheduler_of(deployed)
        for step, time in enumerate(scheduler.timesteps):
            if is_full(step, sample, state):
                prediction, feature = deployed.denoiser.full(sample, step, {})
                assert feature is not None
                state.stored.append((step, feature))
            else:
                prediction = _cached(deployed, weights, sample, step, state)
            state.samples.append(sample)
            state.predictions.append(prediction)
            sample = scheduler.step(prediction, time, sample).prev_sample
        made.append((sample / 2 + 0.5).clamp(0, 1))
        if full is not None:
            full.append(len(state.stored))
    return torch.cat(made)


def _cached(deployed: DeployedPipeline, weights: Weights, sample: Tensor, step: int, state: State) -> Tensor:
    factors = weights([known for known, _ in state.stored], step)
    pairs = [(factor, feature) for factor, (_, feature) in zip(factors, state.stored, strict=True) if factor]
    # A feature as it is keeps the cache part of an error correction.
    is_extrapolated = len(pairs) > 1 or pairs[0][0] != 1
    feature = sum(factor * feature for factor, feature in pairs) if is_extrapolated else pairs[0][1]
    assert isinstance(feature, Tensor)
    return deployed.denoiser.cached(sample, step, {}, feature, is_extrapolated=is_extrapolated)


def noise(deployed: DeployedPipeline, batch: range, seed: int) -> Tensor:
    """Return the noise that the pipeline starts from."""
    config = deployed.pipe.unet.config
    shape = (len(batch), config.in_channels, config.sample_size, config.sample_size)
    return randn_tensor(shape, generator=generators_of(batch, seed))


def scheduler_of(deployed: DeployedPipeline) -> Any:
    """Return a copy of the scheduler, with its timesteps set."""
    scheduler = copy.deepcopy(deployed.pipe.scheduler)
    scheduler.set_timesteps(deployed.num_inference_steps)
    return scheduler
