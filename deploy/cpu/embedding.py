"""The time embedding of one row, in place of equal ones for all rows.

A product of matrices rounds otherwise for another number of rows, and what follows from an embedding is kept
for its time (`errata.deploy.cpu.resnet`): without this, images would depend on the size of the first batch.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from errata.runtime.step_context import StepContext


class OneTimeEmbedding(nn.Module):
    """Stands in for a `TimestepEmbedding`, whose layers it shares under the same names.

    Args:
        block: one that `is_fusible`.
        context: tells the time that is evaluated, if all rows have the same.
    """

    def __init__(self, block: Any, context: StepContext) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = block.linear_1, block.linear_2
        self.act, self.post_act = block.act, block.post_act
        self._context = context

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Whether it is one that gets nothing but the time."""
        return isinstance(block, TimestepEmbedding) and block.cond_proj is None

    def forward(self, sample: Tensor, condition: None = None) -> Tensor:
        """`(B, C)` to `(B, D)`, as the block."""
        is_alike = self._context.time is not None
        embedded: Tensor = self.linear_1(sample[:1] if is_alike else sample)
        embedded = self.linear_2(embedded if self.act is None else self.act(embedded))
        embedded = embedded if self.post_act is None else self.post_act(embedded)
        return embedded.expand(len(sample), -1) if is_alike else embedded
