"""What makes the program wait for an accelerator, and how to go without.

An accelerator works through a queue that the program fills ahead of it. Whoever reads a value (`item`,
`tolist`, `bool`, `nonzero`), or copies from memory that the driver has to move first, waits until the queue
is empty; then it has nothing to do until the program has filled it again. A correction reads values where it
cannot decide otherwise, and says so there; everywhere else it asks here whether reading is free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_free_to_read(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting: it is in main memory."""
    return tensor.device.type == "cpu"


def sent(values: Tensor, like: Tensor) -> Tensor:
    """`values`, made in main memory, in the type and on the device of `like`; nothing waits for the copy."""
    values = values.to(like.dtype)
    if is_free_to_read(like):
        return values
    # From pageable memory CUDA empties its queue before it copies, whatever `non_blocking` says.
    held = values.pin_memory() if like.device.type == "cuda" else values
    return held.to(like.device, non_blocking=True)


def on_host(timestep: Any, value: float | None) -> Any:
    """A timestep that a scheduler can look up without waiting for an accelerator, if its value is known.

    Schedulers index tables in main memory with it, once in every preview. On the CPU it stays as it is.
    """
    if not isinstance(timestep, Tensor) or is_free_to_read(timestep):
        return timestep
    return timestep.cpu() if value is None else torch.tensor(value, dtype=timestep.dtype)


class HostTimesteps:
    """A scheduler's table of timesteps in main memory, copied when it is another one: once a run.

    Pipelines keep that table on the accelerator, and some schedulers (DDPM, the multistep ones at their first
    step) search it for a timestep whenever they step, which a preview would repeat.
    """

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._copy: Tensor | None = None

    def of(self, scheduler: Any) -> Tensor | None:
        """The table, the scheduler's own where reading it is free; None where it has none."""
        table = getattr(scheduler, "timesteps", None)
        if not isinstance(table, Tensor):
            return None
        if table is not self._table:
            self._table, self._copy = table, table.cpu()
        return self._copy
