"""Which recorded denoiser inputs blocks are reconstructed on, and a UNet run on rows of several steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from errata.calibration import CalibrationSet
from errata.compress.rounding.row_store import RowStore
from errata.runtime.unet import BranchedUNet

_COND = "cond."


def choose_inputs(*, num_steps: int, num_samples: int, count: int, seed: int) -> list[tuple[int, list[int]]]:
    """Pairs of a step and the samples taken there, ascending; `count` inputs in all, if there are so many.

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
    """Copies the chosen inputs to an empty store, row by row: `sample`, `step` and `cond.<name>`.

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
        records = calibration_set.batches(step, limit=samples[-1] + 1, batch_size=1)
        for sample, record in enumerate(records):
            if sample not in samples:
                continue
            fitted = record.to(torch.device("cpu"), torch.float32)
            cond = {_COND + name: value for name, value in fitted.cond.items()}
            step_of_rows = torch.full((rows,), step)
            store.append({"sample": fitted.sample, "step": step_of_rows} | cond, rows=rows)


class MixedSteps:
    """Evaluates a UNet on rows of several steps, each with its own timestep."""

    def __init__(self, timesteps: tuple[float, ...]) -> None:
        whole = all(float(time).is_integer() for time in timesteps)
        self._timesteps = torch.tensor(timesteps, dtype=torch.long if whole else torch.float32)

    def __call__(self, unet: nn.Module, step: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The prediction `(B, C, H, W)`; `batch` holds `sample` and `cond.<name>`, `step` is `(B,)`."""
        cond = {
            name.removeprefix(_COND): value.to(step.device)
            for name, value in batch.items()
            if name.startswith(_COND)
        }
        timestep = self._timesteps.to(step.device)[step]
        prediction, _ = BranchedUNet(unet).full(batch["sample"].to(step.device), timestep, cond, branch=0)
        return prediction
