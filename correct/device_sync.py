"""What makes the program wait for an accelerator, and how to avoid it.

An accelerator works through a queue that the program fills ahead of it. Code that reads a value (`item`,
`tolist`, `bool`, `nonzero`), or copies from memory that the driver has to move first, waits until the queue
is empty. Then the accelerator is idle until the program has filled the queue again. A correction reads values
only where it cannot decide without them, and says so there. Everywhere else it asks here whether reading is
free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_free_to_read(tensor: Tensor) -> bool:
    """Return whether the values can be read without waiting, because they are in main memory."""
    return tensor.device.type == "cpu"


def sent(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` from main memory in the type and on the device of `like`, without waiting."""
    values = values.to(like.dtype)
    if is_free_to_read(like):
        return values
    # To copy from pageable memory, CUDA empties its queue first, even with `non_blocking`.
    held = values.pin_memory() if like.device.type == "cuda" else values
    return held.to(like.device, non_blocking=True)


def on_host(timestep: Any, value: float | None) -> Any:
    """Return a timestep that a scheduler can look up without waiting, if its value is known.

    Schedulers index tables in main memory with it, once in every preview. On the CPU it stays as it is.
    """
    if not isinstance(timestep, Tensor) or is_free_to_read(timestep):
        return timestep
    return timestep.cpu() if value is None else torch.tensor(value, dtype=timestep.dtype)


class HostTimesteps:
    """A scheduler's table of timesteps in main memory, copied again only when the table changes, once a run.

    Pipelines keep that table on the accelerator, and some schedulers (DDPM, the multistep ones at their first
    step) search it for a timestep at every step, and so would every preview.
    """

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._copy: Tensor | None = None

    def of(self, scheduler: Any) -> Tensor | None:
        """Return the table, or the scheduler's own if reading it is free; None if it has none."""
        table = getattr(scheduler, "timesteps", None)
        if not isinstance(table, Tensor):
            return None
        if table is not self._table:
            self._table, self._copy = table, table.cpu()
        return self._copy
