"""Numbers that keep their precision when the network around them is converted to half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Exact(nn.Module):
    """Module whose floating-point buffers move between devices but keep their type in `.to(torch.bfloat16)`.

    A rounded scale would be the scale of another grid, for all values alike, and nothing would say so.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: value for name, value in self._buffers.items() if value is not None}
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            converted = self._buffers[name]
            if converted is not None and converted.dtype != value.dtype:
                self._buffers[name] = value.to(converted.device)
        return result
