"""What the choice and the correction of a cache are fitted on: float features along recorded trajectories."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm

from errata.calibration import CalibrationSet
from errata.calibration.calibration_set import Record
from errata.compress.quantize.recorded_inputs import inputs_on
from errata.runtime.unet import BranchedUNet, in_evaluation

# CacheQuant's public code keeps 64 trajectories of a latent model, and as many samples a step for CIFAR-10.
SAMPLES = 64
# Features held at a time: large enough that batches pay, small beside the network's own activations.
_FEATURE_BYTES = 1 << 28
_LARGEST_CHUNK = 32


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
        """F_i, `(rows, C, H, W)`: the feature of the full pass at the input recorded at step i."""
        x, cond = inputs_on(self.unet, record)
        _, feature = self._branched.full(x, float(self._timesteps[record.step]), cond, branch=self._branch)
        assert feature is not None  # only branch=0 keeps none
        return feature

    @torch.no_grad()
    def cached(self, record: Record, feature: Tensor) -> Tensor:
        """The prediction of the cached pass at the input recorded at step i, from `feature` as it is."""
        x, cond = inputs_on(self.unet, record)
        timestep = float(self._timesteps[record.step])
        return self._branched.cached(x, timestep, cond, feature, branch=self._branch)


@torch.no_grad()
def feature_distances(
    unet: nn.Module, calibration_set: CalibrationSet, *, branch: int, interval: int, samples: int = SAMPLES
) -> Tensor:
    """`(T, 2N)`, float64: `[s, k]` is `‖F_{s+k} - F_s‖₁`, summed over the samples; 0 beyond the run.

    F_i is the feature of the float model in a full pass at the input that was recorded at step i, so along
    the trajectory that the float pipeline takes, not the one that a cached pipeline would. Steps are sampler
    steps: where each has several denoiser calls, F_i is the features of all of them, next to each other.

    Memory is that of the features of `2N` steps for a few samples, whatever `T` and `samples`.

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
    """Adds, in place, the distances of a feature to those of the steps before, and appends it to `latest`.

    Each row's distance is summed in the feature's precision, at least float32; the rows' in float64.
    """
    flat = feature.flatten(1).to(torch.promote_types(feature.dtype, torch.float32))
    for back, earlier in enumerate(reversed(latest), start=1):
        rows = (flat - earlier).abs_().sum(dim=1)
        distances[step - back, back] += rows.double().sum().item()
    latest.append(flat)


def chunks(calibration_set: CalibrationSet, *, samples: int, batch_size: int) -> Iterator[Iterator[Record]]:
    """Recorded trajectories, a few samples at a time; of each chunk the records of its steps, in order.

    A chunk must be read to its end before the next one: one record is in memory at a time.
    """
    steps = [
        calibration_set.batches(step, limit=samples, batch_size=batch_size)
        for step in range(calibration_set.num_steps)
    ]
    for first in steps[0]:  # every step is cut at the same samples, so the next of each make a chunk
        yield itertools.chain([first], map(next, steps[1:]))


def progress(calibration_set: CalibrationSet, *, samples: int, title: str, rounds: int = 1) -> tqdm[NoReturn]:
    """A bar that counts samples times steps, `rounds` times over."""
    total = rounds * min(samples, calibration_set.num_samples) * calibration_set.num_steps
    return tqdm(total=total, desc=title, unit="call", disable=None)  # None: not without a terminal


def chunk_size(model: FloatModel, calibration_set: CalibrationSet, *, kept_features: int) -> int:
    """Samples whose features at `kept_features` steps fit into a quarter of a gibibyte; 1 to 32."""
    record = next(calibration_set.batches(0, limit=1))
    feature = model.feature(record)
    sample_bytes = feature.numel() * max(4, feature.element_size())
    return max(1, min(_LARGEST_CHUNK, _FEATURE_BYTES // (kept_features * sample_bytes)))
