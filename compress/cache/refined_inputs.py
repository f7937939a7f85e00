"""What Iterative Error Correction evaluates at a full step, to first order, from recorded trajectories."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import diffusers
import torch
from torch import Tensor

from errata.calibration import CalibrationSet
from errata.calibration.calibration_set import Record
from errata.errors import RecipeError

_INSTEAD = "leave corrected_by=iec out of the recipe"


class RefinedInputs:
    """Inputs of the refinement of a full step.

    IEC evaluates the network where the plain step lands, x^(0), at the timestep and with the input scaling of
    the step itself; the first iterate is as near to the others as the step size says. To first order x^(0) is
    what the pipeline recorded at the next sampler step. Recorded are network inputs `c_s x`, so for a
    scheduler that scales them the next one is multiplied by `c_s / c_{s+1}`. Only the latent channels are
    scaled: where a network has more input than output channels, the first ones are the latent's, and the
    others, a concatenated condition, must be the same at both steps.
    """

    def __init__(self, unet: Any, calibration_set: CalibrationSet) -> None:
        channels: int = calibration_set.sample_shape[0]
        self._latent_channels = min(channels, int(unet.config.out_channels))
        self._scales = input_scales(calibration_set)

    def at(self, full: Record, following: Record) -> Record:
        """The full call's record with the sample that IEC evaluates there.

        `following` is the record of the same call of the next sampler step.

        Raises:
            RecipeError: the concatenated condition changes from step to step, under a scaling scheduler.
        """
        ratio = self._scales[full.step] / self._scales[following.step]
        if ratio == 1.0:
            return dataclasses.replace(full, sample=following.sample)
        latent = following.sample[:, : self._latent_channels] * ratio
        condition = following.sample[:, self._latent_channels :]
        if not torch.equal(condition, full.sample[:, self._latent_channels :]):
            raise RecipeError(
                f"input channels {self._latent_channels} to {full.sample.shape[1] - 1} change between steps "
                f"{full.step} and {following.step}, so how the scheduler scales them is not known; {_INSTEAD}"
            )
        return dataclasses.replace(full, sample=torch.cat([latent, condition], dim=1))


def input_scales(calibration_set: CalibrationSet) -> tuple[float, ...]:
    """c_i, by which the recorded scheduler multiplies the latent to make the network's input at call i.

    Taken from a scheduler of the recorded class and configuration that steps once through its timesteps, so
    second-order ones are in the state that they are in during a run. Several calls of the network in a
    sampler step have the same.

    Raises:
        RecipeError: the scheduler scales, and its timesteps are not the recorded ones; or it cannot be run.
    """
    try:
        scales, timesteps = _walk(calibration_set)
    except Exception as error:  # diffusers raises whatever it likes
        raise RecipeError(
            f"the input scaling of {calibration_set.scheduler_class} cannot be determined: {error!r}; "
            f"{_INSTEAD}"
        ) from error
    recorded = calibration_set.timesteps
    if all(scale == 1.0 for scale in scales):
        return (1.0,) * len(recorded)
    is_same_run = len(timesteps) == len(recorded) and all(map(math.isclose, timesteps, recorded))
    if not is_same_run:
        raise RecipeError(
            f"{calibration_set.scheduler_class} scales its inputs, and with num_inference_steps="
            f"{calibration_set.num_inference_steps} its timesteps are not the recorded ones: how those inputs"
            f" were scaled is not known; {_INSTEAD}"
        )
    return tuple(scales)


def _walk(calibration_set: CalibrationSet) -> tuple[list[float], list[float]]:
    scheduler_class: Any = getattr(diffusers, calibration_set.scheduler_class)
    scheduler = scheduler_class.from_config(calibration_set.scheduler_config)
    scheduler.set_timesteps(calibration_set.num_inference_steps)
    sample = torch.zeros(1, calibration_set.sample_shape[0], 1, 1)
    scales, timesteps = list[float](), list[float]()
    with torch.random.fork_rng(devices=[]):  # ancestral samplers draw noise
        for time in scheduler.timesteps:
            scaled: Tensor = scheduler.scale_model_input(torch.ones_like(sample), time)
            scales += [float(scaled.flatten()[0])] * calibration_set.calls_per_step
            timesteps += [float(time)] * calibration_set.calls_per_step
            scheduler.step(torch.zeros_like(sample), time, sample)
    return scales, timesteps
