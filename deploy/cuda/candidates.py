"""The ways to compute a layer, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from errata.deploy.cuda.products import HalfProduct, IntMmProduct, TritonProduct
from errata.deploy.cuda.tables import DeviceStepTable
from errata.deploy.cuda.tiles import TILES
from errata.deploy.cuda.weights import PartWeight
from errata.deploy.cuda.window import Window

INT_MM = "_int_mm"
HALVES = {"half bfloat16": torch.bfloat16, "half float16": torch.float16}
# `torch._int_mm` on CUDA, torch 2.13.
_INT_MM_MORE_ROWS_THAN = 16
_INT_MM_MULTIPLE = 8


@dataclass(frozen=True)
class Part:
    """One part of a layer: its codes, its bias (first part only), its scales by step."""

    weight: PartWeight
    bias: Tensor | None
    table: DeviceStepTable

    def product(self, name: str, window: Window) -> nn.Module:
        """Return the way of that name."""
        if name in TILES:
            return TritonProduct(self.weight, self.bias, self.table, window, TILES[name])
        if name == INT_MM:
            return IntMmProduct(self.weight, self.bias, self.table, window)
        return HalfProduct(self.weight, self.bias, window, HALVES[name])


def half_for(dtype: torch.dtype) -> str:
    """Return the half precision to weigh against int8 for activations of that type.

    Their own, if they are half; for float32 bfloat16, whose exponent nothing in float32 can exceed.
    """
    return "half float16" if dtype is torch.float16 else "half bfloat16"


def candidates(
    *,
    rows: int,
    channels: tuple[int, ...],
    out_channels: int,
    taps: int,
    dtype: torch.dtype,
    has_triton: bool,
) -> tuple[str, ...]:
    """Return the names of what can compute a layer at a shape; `rows` are output pixels, or rows."""
    names = tuple(TILES) if has_triton else ()
    fits = all(taps * width % _INT_MM_MULTIPLE == 0 for width in channels)
    if fits and out_channels % _INT_MM_MULTIPLE == 0 and rows > _INT_MM_MORE_ROWS_THAN:
        names = (*names, INT_MM)
    return (*names, half_for(dtype))
