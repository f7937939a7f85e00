"""Refuses trajectories whose calls no cache schedule can keep apart."""

from __future__ import annotations

import itertools

import torch

from errata.calibration import CalibrationSet
from errata.errors import RecipeError


def check_regular_guidance(calibration_set: CalibrationSet) -> None:
    """Refuses guidance that takes several denoiser calls in a part of the sampler steps only.

    The streams of such calls do not take turns in a fixed order, so a cached call would read the feature of
    another condition. They show in neighbouring calls with one timestep and one input, but other conditions;
    a sampler that comes back to a timestep has moved its input on.

    Raises:
        RecipeError: naming the two calls.
    """
    if calibration_set.calls_per_step > 1:
        return
    for step, (time, following) in enumerate(itertools.pairwise(calibration_set.timesteps)):
        if time != following:
            continue
        one, other = (next(calibration_set.batches(call, limit=1)) for call in (step, step + 1))
        is_same_cond = all(torch.equal(one.cond[name], other.cond[name]) for name in one.cond)
        if torch.equal(one.sample, other.sample) and not is_same_cond:
            raise RecipeError(
                f"calls {step} and {step + 1} evaluate the same input under two conditions, but not every "
                "sampler step has as many calls (is guidance on for only a part of them?): a cache would mix "
                "their features; guide every step or none and collect again, or leave the cache out"
            )
