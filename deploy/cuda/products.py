"""The ways to compute one part of a layer: Triton's int8, cuBLAS' int8, half precision.

All take `x`, `(B, H, W, C)` with any strides, and return `(B, H', W', O)`, contiguous; a linear layer's rows
are images of one pixel. `bias` is `(O,)`; `residual`, `(B, H', W', O)`, is added at the end. Sums are made in
float32, or exactly.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.deploy.cuda.operators import activation_codes, int8_product, window_numbers
from errata.deploy.cuda.tables import DeviceStepTable
from errata.deploy.cuda.tiles import Tile
from errata.deploy.cuda.weights import PartWeight
from errata.deploy.cuda.window import Window
from errata.runtime.ranges import quantize


class Product(Protocol):
    """One part of a layer, computed in some way."""

    def __call__(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the product in `dtype`; see the module for the shapes."""


class TritonProduct(nn.Module):
    """Two Triton kernels: one makes codes, the other the product and all that follows."""

    def __init__(
        self, weight: PartWeight, bias: Tensor | None, table: DeviceStepTable, window: Window, tile: Tile
    ) -> None:
        super().__init__()
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self.weight = weight
        self.table = table
        self.window = window_numbers(window)
        self.tile = tile.numbers(is_int4=weight.is_packed)

    def forward(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Product`."""
        weight, table = self.weight, self.table
        activation = (table.scale, table.zero_point, table.step())
        codes = activation_codes(x, *activation)
        output: Tensor = int8_product(
            codes, weight.codes, weight.column_sum, weight.scale, self.bias, residual, *activation,
            self.window, weight.is_packed, dtype, self.tile,
        )  # fmt: skip
        return output


class IntMmProduct(nn.Module):
    """`torch._int_mm` (cuBLASLt), on windows copied out where a window has more than one pixel.

    Everything here is plain torch, so torch.compile fuses what comes before and after the product.
    """

    def __init__(
        self, weight: PartWeight, bias: Tensor | None, table: DeviceStepTable, window: Window
    ) -> None:
        super().__init__()
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self.weight = weight
        self.table = table
        self.window = window
        self.codes: Tensor
        self.register_buffer("codes", weight.unpacked().flatten(1))

    def forward(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Product`."""
        scale, zero_point = self.table.now()
        vertical, horizontal = self.window.padding
        # Padded with real zeros while they are reals: their code is the zero point, whatever it is.
        padded = functional.pad(x, (0, 0, horizontal, horizontal, vertical, vertical)).float()
        codes = (quantize(padded, scale, zero_point, bits=8) - 128).to(torch.int8)
        rows = written_out(codes, self.window, self.window.output_size(*x.shape[1:3]))
        total = torch._int_mm(rows.flatten(0, 2), self.codes.t())
        total = total - (zero_point - 128) * self.weight.column_sum
        output = (total.float() * (scale * self.weight.scale)).unflatten(0, rows.shape[:3])
        if self.bias is not None:
            output = output + self.bias
        return _added(output, residual, dtype)


class HalfProduct(nn.Module):
    """cuDNN or cuBLAS in half precision, with the dequantized weight and the input as it is.

    Args:
        half: bfloat16 or float16.
    """

    def __init__(self, weight: PartWeight, bias: Tensor | None, window: Window, half: torch.dtype) -> None:
        super().__init__()
        self.bias: Tensor | None
        self.register_buffer("bias", None if bias is None else bias.to(half))
        self.window = window
        self.half_type = half
        reals = (weight.unpacked().float() * weight.scale[:, None, None]).to(half)
        shaped = reals.unflatten(1, window.kernel).permute(0, 3, 1, 2)  # channels_last, (O, C, kh, kw)
        self.reals: Tensor
        self.register_buffer("reals", reals.squeeze(1) if window.is_pixel else shaped)

    def forward(self, x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Product`."""
        x = x.to(self.half_type)
        if self.window.is_pixel:
            output = functional.linear(x, self.reals, self.bias)
        else:
            window = self.window
            output = functional.conv2d(
                x.permute(0, 3, 1, 2), self.reals, self.bias, window.stride, window.padding, window.dilation
            ).permute(0, 2, 3, 1)
        return _added(output, residual, dtype)


def written_out(codes: Tensor, window: Window, size: tuple[int, int]) -> Tensor:
    """Return the windows of `codes`, `(B, H, W, C)`, padded already: `(B, H', W', taps · C)`, contiguous."""
    if window.kernel == (1, 1) and window.stride == (1, 1):
        return codes.contiguous()
    taps = [
        codes[:, _walk(window, 0, y, size[0]), _walk(window, 1, x, size[1])]
        for y in range(window.kernel[0])
        for x in range(window.kernel[1])
    ]
    return torch.cat(taps, dim=-1)


def _walk(window: Window, axis: int, tap: int, size: int) -> slice:
    start, stride = tap * window.dilation[axis], window.stride[axis]
    return slice(start, start + stride * (size - 1) + 1, stride)


def _added(output: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    if residual is not None:
        output = output.float() + residual
    return output.to(dtype).contiguous()
