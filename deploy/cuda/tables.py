"""Scale and zero point of an activation at every step, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.deploy.cuda.exact import Exact
from errata.runtime.step_context import StepContext


class DeviceStepTable(Exact):
    """Buffers `scale`, float32, and `zero_point`, int32, both `(T,)`, and the step of a context.

    The step is looked up on the device, so neither the host waits nor a program depends on it.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, context: StepContext) -> None:
        super().__init__()
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", scale.float().contiguous())
        self.register_buffer("zero_point", zero_point.to(torch.int32).contiguous())
        self.context = context

    def step(self) -> Tensor:
        """Return the step under way, `(1,)`, int64.

        Raises:
            RuntimeError: outside an evaluation.
        """
        return self.context.step_on(self.scale.device)

    def now(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the step under way, each `(1,)`."""
        step = self.step()
        return self.scale.index_select(0, step), self.zero_point.index_select(0, step)
