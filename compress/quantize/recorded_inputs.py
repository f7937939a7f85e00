"""Recorded denoiser inputs of several steps in one batch, each row with its own step and timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from errata.calibration import CalibrationSet, Record, nest

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
        """The rows of these records, one after another; a whole-number timestep stays one."""
        records = [record.to(torch.device("cpu"), torch.float32) for record in records]
        times = [float(record.timestep) for record in records]
        rows = torch.tensor([len(record.sample) for record in records])
        dtype = torch.long if all(time.is_integer() for time in times) else torch.float32
        return cls(
            x=torch.cat([record.sample for record in records]),
            timesteps=torch.tensor(times).to(dtype).repeat_interleave(rows),
            steps=torch.tensor([record.step for record in records]).repeat_interleave(rows),
            cond={name: torch.cat([record.cond[name] for record in records]) for name in records[0].cond},
        )

    def to(self, device: torch.device) -> MixedRows:
        """The same rows on another device."""
        cond = {name: value.to(device) for name, value in self.cond.items()}
        return MixedRows(self.x.to(device), self.timesteps.to(device), self.steps.to(device), cond)

    def predict(self, unet: nn.Module) -> Tensor:
        """What a diffusers UNet predicts, `(B, C, H, W)`; set the step context of a simulated one first."""
        prediction: Tensor = unet(self.x, self.timesteps, **nest(self.cond), return_dict=False)[0]
        return prediction


def mixed_rows(
    calibration_set: CalibrationSet, *, samples: int, batch_size: int, steps: Sequence[int] | None = None
) -> list[MixedRows]:
    """About `samples` recorded inputs, spread evenly over steps and over trajectories, in batches.

    Neighbouring steps take other trajectories, because inputs of one trajectory resemble each other. With
    more steps than samples some steps are left out, evenly, and the calls of a sampler step take turns. The
    result is held in memory: inputs only, and `samples` bounds it whatever the size of the set. The choice is
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
        one_by_one = calibration_set.batches(step, limit=first + per_step, batch_size=1)
        records += islice(one_by_one, first, None)
    return [MixedRows.of(records[first : first + batch_size]) for first in range(0, len(records), batch_size)]


def _spread(samples: int, calibration_set: CalibrationSet, steps: Sequence[int] | None) -> list[int]:
    """At most that many steps, spread evenly; without `steps` over the streams too."""
    if steps is not None:
        count = min(samples, len(steps))
        return [steps[position * len(steps) // count] for position in range(count)]
    streams, num_calls = calibration_set.calls_per_step, calibration_set.num_steps
    count = min(samples, num_calls)
    # Every second call of guidance in two calls would be the unconditional one each time.
    blocks = [position * (num_calls // streams) // count for position in range(count)]
    return sorted(block * streams + position % streams for position, block in enumerate(blocks))


def inputs_on(unet: nn.Module, record: Record) -> tuple[Tensor, dict[str, Tensor]]:
    """Sample and conditioning of a record, on the network's device and in its floating-point type."""
    parameter = next(unet.parameters())
    fitted = record.to(parameter.device, parameter.dtype)
    return fitted.sample, fitted.cond
