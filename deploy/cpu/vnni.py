"""Convolutions and linear layers on the project's own AVX512-VNNI kernel, `int8_product.c`.

It reads the pixels of an image where they lie, so that nothing is copied for a convolution, and adds what a
residual block adds while it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errata.deploy.cpu import native
from errata.runtime.layers import Geometry

_LANES = 16  # outputs of a vector, in int32
_VECTORS, _TILED_VECTORS = 4, 2  # of a panel
_ALIGNMENT = 64  # bytes
# Input channels that one instruction multiplies.
CHANNELS_AT_ONCE = 4
MOST_TAPS = 64


def obstacle(geometry: Geometry, weight_shape: Sequence[int], widths: Sequence[int]) -> str:
    """Return why the kernel cannot compute a layer with parts of those widths; empty where it can."""
    if reason := native.product_obstacle():
        return reason
    taps = weight_shape[2] * weight_shape[3] if geometry.is_conv else 1
    if taps > MOST_TAPS:
        return f"its convolution kernel has {taps} pixels; at most {MOST_TAPS} are supported"
    odd = [width for width in widths if width % CHANNELS_AT_ONCE]
    return f"{odd[0]} channels are not a multiple of {CHANNELS_AT_ONCE}" if odd else ""


class VNNIProduct:
    """Product with the weight of one part, int8 `(O, I)` or `(O, I, kh, kw)`, a scale for each output."""

    def __init__(self, geometry: Geometry, weight: Tensor, scale: Tensor) -> None:
        self._is_conv = geometry.is_conv
        kernels = weight if geometry.is_conv else weight[:, :, None, None]
        self._kernel = tuple(kernels.shape[2:])
        self._padding, self._stride, self._dilation = (
            tuple(values) if geometry.is_conv else neutral
            for values, neutral in (
                (geometry.padding, (0, 0)),
                (geometry.stride, (1, 1)),
                (geometry.dilation, (1, 1)),
            )
        )
        self._outputs = len(weight)
        self._is_tiled = native.has_tiles() and native.tiles_serve(kernels.shape[1])
        self._packed = _packed(kernels, vectors=_TILED_VECTORS if self._is_tiled else _VECTORS)
        self._scale = scale.float().contiguous()
        self._sums = kernels.sum(dim=(1, 2, 3), dtype=torch.int32)

    def __deepcopy__(self, memo: dict[int, Any]) -> VNNIProduct:
        """Return itself: nothing of it ever changes, and clones of an artifact share weights."""
        return self

    def __call__(
        self,
        codes: Tensor,
        scale: float,
        zero_point: int,
        bias: Tensor | None,
        added: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the product with codes, `(B, I, H, W)` or `(…, I)`, plus `added`, float32 of its shape.

        `dtype` is that of the result, float32 or bfloat16.
        """
        if not self._is_conv:
            rows = codes.contiguous()
            output = torch.empty((*rows.shape[:-1], self._outputs), dtype=dtype)
            added = None if added is None else added.contiguous()
            sizes = (1, 1, rows.numel() // rows.shape[-1], rows.shape[-1])
        else:
            rows = codes.contiguous(memory_format=torch.channels_last)
            batch, channels, height, width = rows.shape
            shape = (batch, self._outputs, *self._output_size((height, width)))
            output = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
            added = None if added is None else added.contiguous(memory_format=torch.channels_last)
            sizes = (batch, height, width, channels)
        assert added is None or (added.shape == output.shape and added.dtype is torch.float32)
        out_size = output.shape[2:] if self._is_conv else sizes[1:3]
        native.int8_product(
            native.Product(
                rows.data_ptr(), self._packed.data_ptr(), self._scale.data_ptr(), self._sums.data_ptr(),
                None if bias is None else bias.data_ptr(), None if added is None else added.data_ptr(),
                output.data_ptr(), *sizes, *out_size, self._outputs, *self._kernel, *self._padding,
                *self._stride, *self._dilation, scale, zero_point, dtype is torch.bfloat16,
                self._is_tiled,
            )
        )  # fmt: skip
        return output

    def _output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (
            (size[axis] + 2 * self._padding[axis] - self._dilation[axis] * (self._kernel[axis] - 1) - 1)
            // self._stride[axis]
            + 1
            for axis in (0, 1)
        )
        return height, width


def _packed(kernels: Tensor, *, vectors: int) -> Tensor:
    """Return a weight `(O, I, kh, kw)` in the panels that `int8_product.h` describes, aligned."""
    outputs = len(kernels)
    padded = functional.pad(kernels, (0, 0, 0, 0, 0, 0, 0, -outputs % _LANES))
    rows = padded.permute(0, 2, 3, 1).flatten(1)
    panels = [
        panel.unflatten(1, (-1, CHANNELS_AT_ONCE)).transpose(0, 1).flatten()
        for panel in rows.split(vectors * _LANES)
    ]
    size = sum(len(panel) for panel in panels)
    memory = torch.empty(size + _ALIGNMENT, dtype=torch.int8)
    start = -memory.data_ptr() % _ALIGNMENT
    aligned = memory[start : start + size]
    return aligned.copy_(torch.cat(panels))
