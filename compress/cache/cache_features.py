"""Recorded trajectories as a cache sees them: float features, the streams of guidance, IEC's inputs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NoReturn

import diffusers
import torch
from torch import Tensor, nn
from tqdm import tqdm

from errata.calibration import CalibrationSet
from errata.calibration.calibration_set import Record
from errata.compress.quantize.recorded_inputs import inputs_on
from errata.errors import RecipeError
from errata.runtime.unet import BranchedUNet, in_evaluation

# CacheQuant's public code keeps 64 trajectories of a latent model, and as many samples a step for CIFAR-10.
SAMPLES = 64
# Features held at a time: large enough that batches pay, small beside the network's own activations.
_FEATURE_BYTES = 1 << 28
_LARGEST_CHUNK = 32
_INSTEAD = "leave corrected_by=iec out of the recipe"


class FloatModel:
    """A float UNet that is evaluated at recorded inputs, as the recording pipeline did; `unet` is left alone.

    `branch` says where the feature is taken.
    """

    def __init__(self, unet: nn.Module, calibration_set: CalibrationSet, *, branch: int) -> None:
        self.unet = in_evaluation(unet)
        self._branched = BranchedUNet(self.unet)
        self._timesteps = calibration_set.timesteps
        self._branch = branch

    @torch.no_grad()
    def feature(self, record: Record) -> Tensor:
        """Return F_i, `(rows, C, H, W)`: the feature of the full pass at the input recorded at step i."""
        x, cond = inputs_on(self.unet, record)
        _, feature = self._branched.full(x, float(self._timesteps[record.step]), cond, branch=self._branch)
        assert feature is not None  # only branch=0 keeps none
        return feature

    @torch.no_grad()
    def cached(self, record: Record, feature: Tensor) -> Tensor:
        """Return the prediction of the cached pass at the input recorded at step i, from `feature`."""
        x, cond = inputs_on(self.unet, record)
        timestep = float(self._timesteps[record.step])
        return self._branched.cached(x, timestep, cond, feature, branch=self._branch)


@torch.no_grad()
def feature_distances(
    unet: nn.Module, calibration_set: CalibrationSet, *, branch: int, interval: int, samples: int = SAMPLES
) -> Tensor:
    """Return `(T, 2N)`, float64: `[s, k]` is `‖F_{s+k} - F_s‖₁`, summed over the samples; 0 beyond the run.

    F_i is the feature of the float model in a full pass at the input that was recorded at step i, so along
    the trajectory that the float pipeline takes, not the one that a cached pipeline would. Steps are sampler
    steps: where each has several denoiser calls, F_i is the features of all of them, next to each other.

    Memory is that of the features of `2N` steps for a few samples, for any `T` and `samples`.

    Args:
        unet: the float network; left alone.
        calibration_set: its trajectories.
        branch: where the feature is taken.
        interval: N.
        samples: how many trajectories to use, at most.
    """
    model = FloatModel(unet, calibration_set, branch=branch)
    streams = calibration_set.calls_per_step
    distances = torch.zeros(calibration_set.num_steps // streams, 2 * interval, dtype=torch.float64)
    size = chunk_size(model, calibration_set, kept_features=2 * interval * streams)
    with progress(calibration_set, samples=samples, title="cache schedule") as bar:
        for chunk in chunks(calibration_set, samples=samples, batch_size=size):
            latest = [deque[Tensor](maxlen=2 * interval - 1) for _ in range(streams)]
            for record in chunk:
                step, stream = divmod(record.step, streams)
                add_distances(distances, model.feature(record), latest[stream], step=step)
                bar.update(len(record.sample) // calibration_set.rows_per_sample)
    return distances


def add_distances(distances: Tensor, feature: Tensor, latest: deque[Tensor], *, step: int) -> None:
    """Add, in place, the distances of a feature to those of the steps before, and append it to `latest`.

    Each row's distance is summed in the feature's precision, at least float32; the rows' in float64.
    """
    flat = feature.flatten(1).to(torch.promote_types(feature.dtype, torch.float32))
    for back, earlier in enumerate(reversed(latest), start=1):
        rows = (flat - earlier).abs_().sum(dim=1)
        distances[step - back, back] += rows.double().sum().item()
    latest.append(flat)


def chunks(calibration_set: CalibrationSet, *, samples: int, batch_size: int) -> Iterator[Iterator[Record]]:
    """Yield recorded trajectories, a few samples at a time: of each chunk the records of its steps, in order.

    A chunk must be read to its end before the next one: one record is in memory at a time.
    """
    steps = [
        calibration_set.batches(step, limit=samples, batch_size=batch_size)
        for step in range(calibration_set.num_steps)
    ]
    for first in steps[0]:  # every step is cut at the same samples, so the next of each make a chunk
        yield itertools.chain([first], map(next, steps[1:]))


def progress(calibration_set: CalibrationSet, *, samples: int, title: str, rounds: int = 1) -> tqdm[NoReturn]:
    """Return a progress bar that counts samples times steps, `rounds` times over."""
    total = rounds * min(samples, calibration_set.num_samples) * calibration_set.num_steps
    return tqdm(total=total, desc=title, unit="call", disable=None)  # None: not without a terminal


def chunk_size(model: FloatModel, calibration_set: CalibrationSet, *, kept_features: int) -> int:
    """Return how many samples' features at `kept_features` steps fit into 256 MiB; 1 to 32."""
    record = next(calibration_set.batches(0, limit=1))
    feature = model.feature(record)
    sample_bytes = feature.numel() * max(4, feature.element_size())
    return max(1, min(_LARGEST_CHUNK, _FEATURE_BYTES // (kept_features * sample_bytes)))


def check_regular_guidance(calibration_set: CalibrationSet) -> None:
    """Check that guidance does not take several denoiser calls in only a part of the sampler steps.

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
                "sampler step has as many calls (is guidance on for only some of them?): a cache would mix "
                "their features; guide every step or none and calibrate again, or leave the cache out"
            )


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
        """Return the full call's record with the sample that IEC evaluates there.

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
    """Return c_i, the factor from the latent to the network's input at call i under the recorded scheduler.

    Taken from a scheduler of the recorded class and configuration that steps once through its timesteps, so
    second-order ones are in the state that they are in during a run. Several calls of the network in a
    sampler step have the same.

    Raises:
        RecipeError: the scheduler scales, and its timesteps are not the recorded ones; or it cannot be run.
    """
    try:
        scales, timesteps = _walk(calibration_set)
    except Exception as error:  # diffusers raises many kinds of errors
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
