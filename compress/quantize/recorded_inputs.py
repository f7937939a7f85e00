"""Recorded denoiser inputs of several steps in one batch, each row with its own step and timestep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.calibration import CalibrationSet, Record
from errata.compress.rounding.row_store import RowStore
from errata.runtime.unet import BranchedUNet

_COND = "cond."
# Timestep-wise calibration keeps 64 samples a step for CIFAR-10 (CacheQuant, public code).
SAMPLES_PER_STEP = 64


@dataclass(frozen=True)
class MixedRows:
    """Rows `x` `(B, C, H, W)`, their `timesteps` and `steps` `(B,)`, and the other arguments by name.

    With guidance a sample has several rows, which stay together.
    """

    x: Tensor
    timesteps: Tensor
    steps: Tensor
    cond: Mapping[str, Tensor]

    @classmethod
    def of(cls, records: Sequence[Record]) -> MixedRows:
        """Return the rows of these records, one after another; a whole-number timestep stays one."""
        records = [record.to(torch.device("cpu"), torch.float32) for record in records]
        times = [float(record.timestep) for record in records]
        rows = torch.tensor([len(record.sample) for record in records])
        return cls(
            x=torch.cat([record.sample for record in records]),
            timesteps=_as_tensor(times).repeat_interleave(rows),
            steps=torch.tensor([record.step for record in records]).repeat_interleave(rows),
            cond={name: torch.cat([record.cond[name] for record in records]) for name in records[0].cond},
        )

    def to(self, device: torch.device) -> MixedRows:
        """Return the same rows on another device."""
        cond = {name: value.to(device) for name, value in self.cond.items()}
        return MixedRows(self.x.to(device), self.timesteps.to(device), self.steps.to(device), cond)

    def predict(self, unet: nn.Module) -> Tensor:
        """Return a diffusers UNet's prediction, `(B, C, H, W)`; set a simulated one's step context first."""
        prediction, _ = BranchedUNet(unet).full(self.x, self.timesteps, self.cond, branch=0)
        return prediction


def mixed_rows(
    calibration_set: CalibrationSet, *, samples: int, batch_size: int, steps: Sequence[int] | None = None
) -> list[MixedRows]:
    """Return about `samples` recorded inputs, spread evenly over steps and over trajectories, in batches.

    Neighbouring steps take other trajectories, because inputs of one trajectory resemble each other. With
    more steps than samples some steps are left out, evenly, and the calls of a sampler step take turns. The
    result is held in memory: inputs only, and `samples` bounds it for any size of the set. The choice is
    deterministic.

    Args:
        calibration_set: where they come from.
        samples: how many, roughly: every chosen step gives the same number.
        batch_size: samples a batch.
        steps: steps to choose from; None means all.
    """
    chosen = _spread(samples, calibration_set, steps)
    pool = min(SAMPLES_PER_STEP, calibration_set.num_samples)
    per_step = min(max(1, round(samples / len(chosen))), pool)
    records: list[Record] = []
    for position, step in enumerate(chosen):
        first = position % (pool // per_step) * per_step
        records += _records_at(calibration_set, step, range(first, first + per_step))
    return [MixedRows.of(records[first : first + batch_size]) for first in range(0, len(records), batch_size)]


def _spread(samples: int, calibration_set: CalibrationSet, steps: Sequence[int] | None) -> list[int]:
    """Return at most that many steps, spread evenly; without `steps` over the streams too."""
    if steps is not None:
        count = min(samples, len(steps))
        return [steps[position * len(steps) // count] for position in range(count)]
    streams, num_calls = calibration_set.calls_per_step, calibration_set.num_steps
    count = min(samples, num_calls)
    # Every second call of guidance in two calls would be the unconditional one each time.
    blocks = [position * (num_calls // streams) // count for position in range(count)]
    return sorted(block * streams + position % streams for position, block in enumerate(blocks))


def inputs_on(unet: nn.Module, record: Record) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a record's sample and conditioning, on the network's device and in its floating-point type."""
    parameter = next(unet.parameters())
    fitted = record.to(parameter.device, parameter.dtype)
    return fitted.sample, fitted.cond


def choose_inputs(*, num_steps: int, num_samples: int, count: int, seed: int) -> list[tuple[int, list[int]]]:
    """Return pairs of a step and the samples taken there, ascending; at most `count` inputs in all.

    Steps get equal shares, to within one; with fewer inputs than steps, the steps that get one are spread
    evenly. At each step another random set of samples is taken.
    """
    count = min(count, num_steps * num_samples)
    shares = [0] * num_steps
    for position in range(count):
        shares[position * num_steps // count] += 1
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for step, share in enumerate(shares):
        order = torch.randperm(num_samples, generator=generator).tolist()
        if share:
            chosen.append((step, sorted(order[:share])))
    return chosen


def spill_inputs(calibration_set: CalibrationSet, store: RowStore, *, count: int, seed: int) -> None:
    """Copy the chosen inputs to an empty store, row by row: `sample`, `step` and `cond.<name>`.

    With guidance an input has several rows, which are independent of each other from here on.
    """
    rows = calibration_set.rows_per_sample
    chosen = choose_inputs(
        num_steps=calibration_set.num_steps,
        num_samples=calibration_set.num_samples,
        count=count,
        seed=seed,
    )
    for step, samples in chosen:
        for record in _records_at(calibration_set, step, samples):
            fitted = record.to(torch.device("cpu"), torch.float32)
            cond = {_COND + name: value for name, value in fitted.cond.items()}
            step_of_rows = torch.full((rows,), step)
            store.append({"sample": fitted.sample, "step": step_of_rows} | cond, rows=rows)


class MixedSteps:
    """A UNet's evaluation on rows of a `RowStore` that `spill_inputs` filled, each at its own timestep."""

    def __init__(self, timesteps: Sequence[float]) -> None:
        self._timesteps = _as_tensor([float(time) for time in timesteps])

    def __call__(self, unet: nn.Module, step: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction `(B, C, H, W)`; `batch` has `sample` and `cond.<name>`, `step` is `(B,)`."""
        rows = MixedRows(
            x=batch["sample"],
            timesteps=self._timesteps[step.cpu()],
            steps=step,
            cond={name.removeprefix(_COND): value for name, value in batch.items() if name.startswith(_COND)},
        )
        return rows.to(step.device).predict(unet)


def _records_at(calibration_set: CalibrationSet, step: int, samples: Sequence[int]) -> Iterator[Record]:
    """Yield these samples' records of a step, one sample each; `samples` ascend."""
    one_by_one = calibration_set.batches(step, limit=samples[-1] + 1, batch_size=1)
    return (record for sample, record in enumerate(one_by_one) if sample in samples)


def _as_tensor(timesteps: Sequence[float]) -> Tensor:
    """Return timesteps of the type that a scheduler would pass: whole numbers stay whole."""
    is_whole = all(time.is_integer() for time in timesteps)
    return torch.tensor(timesteps).to(torch.long if is_whole else torch.float32)
