"""Samplers as they are, and as a pipeline with guidance in several calls uses them."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from errata.runtime.sampler import calls_per_step

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    functools.partial(PNDMScheduler, skip_prk_steps=True),
    UniPCMultistepScheduler,
]
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42, NumPy 2


def timesteps(make: Callable[[], Any], num_inference_steps: int) -> list[float]:
    scheduler = make()
    scheduler.set_timesteps(num_inference_steps)
    return [float(time) for time in scheduler.timesteps]


@pytest.mark.parametrize("num_inference_steps", [4, 5, 12, 50])
@pytest.mark.parametrize("make", SCHEDULERS)
def test_a_sampler_makes_one_call_per_step_and_guidance_in_several_makes_as_many(
    make: Callable[[], Any], num_inference_steps: int
) -> None:
    once = timesteps(make, num_inference_steps)
    assert calls_per_step(once) == 1
    for calls in (2, 3):
        assert calls_per_step([time for time in once for _ in range(calls)]) == calls


@pytest.mark.parametrize(
    ("make", "repeated"),
    [
        (functools.partial(PNDMScheduler, skip_prk_steps=True), 1),
        (PNDMScheduler, 6),
        (HeunDiscreteScheduler, 4),
    ],
)
def test_some_of_these_samplers_repeat_timesteps(make: Callable[[], Any], repeated: int) -> None:
    times = timesteps(make, 5)
    assert sum(before == after for before, after in itertools.pairwise(times)) == repeated


@pytest.mark.parametrize(
    ("times", "calls"),
    [
        ([7], 1),
        ([7, 7], 2),
        ([7, 7, 7], 3),
        ([9, 9, 5, 5, 1, 1], 2),
        ([9, 9, 9, 5, 5, 5], 3),
        ([9, 9, 9, 9, 5, 5, 5, 5], 4),
        ([9, 9, 5, 5, 9, 9], 2),
        ([9, 9, 5, 5, 1], 1),
        ([9, 5, 5, 1, 1], 1),
        ([9, 9, 9, 5, 5], 1),
        ([0.5, 0.5, 0.25, 0.25], 2),
    ],
)
def test_by_hand(times: list[float], calls: int) -> None:
    assert calls_per_step(times) == calls
