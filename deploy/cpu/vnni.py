"""Convolutions and linear layers on the project's own kernel, `int8_product.c`.

It reads the pixels of an image where they lie, so that nothing is copied for a convolution, and adds what a
residual block adds while it writes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errata.deploy.cpu import native, recording
from errata.deploy.cpu.arguments import Product
from errata.deploy.cpu.instructions import Operation
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
    if geometry.is_conv and max(widths) < CHANNELS_AT_ONCE:  # a first convolution: its input is padded
        return ""
    return f"{odd[0]} channels are not a multiple of {CHANNELS_AT_ONCE}" if odd else ""


class VNNIProduct:
    """Product with the weight of one part, int8 `(O, I)` or `(O, I, kh, kw)`, a scale for each output.

    Attributes:
        outputs: their number, O.
    """

    def __init__(self, geometry: Geometry, weight: Tensor, scale: Tensor) -> None:
        self._is_conv = geometry.is_conv
        kernels = _padded(weight) if geometry.is_conv else weight[:, :, None, None]
        self._kernel = tuple(kernels.shape[2:])
        self._padding, self._stride, self._dilation = (
            tuple(values) if geometry.is_conv else neutral
            for values, neutral in (
                (geometry.padding, (0, 0)),
                (geometry.stride, (1, 1)),
                (geometry.dilation, (1, 1)),
            )
        )
        self.outputs = len(weight)
        self._is_tiled = native.has_tiles() and native.tiles_serve(kernels.shape[1])
        self._vectors = _TILED_VECTORS if self._is_tiled else _VECTORS
        self._packed = _packed(kernels, vectors=self._vectors)
        self._inputs, self._channels = weight.shape[1], kernels.shape[1]
        self._scale = scale.float().contiguous()
        self._sums = kernels.sum(dim=(1, 2, 3), dtype=torch.int32)

    def __deepcopy__(self, memo: dict[int, Any]) -> VNNIProduct:
        """Return itself: nothing of it ever changes, and clones of an artifact share weights."""
        return self

    def __call__(
        self,
        codes: Tensor,
        quantizer: native.Quantizer,
        bias: Tensor | None,
        added: Tensor | None,
        dtype: torch.dtype,
        *,
        below: int = 0,
    ) -> Tensor:
        """Return the product with codes, `(B, I, H, W)` or `(…, I)`, plus `added`, float32 of its shape.

        `dtype` is that of the result, float32 or bfloat16; `below` is told in `Int8Layer.product`.
        """
        if not self._is_conv:
            rows = codes.contiguous()
            output = recording.empty((*rows.shape[:-1], self.outputs), dtype)
            added = None if added is None else added.contiguous()
            sizes = _sizes_of(rows)
        else:
            rows = codes.contiguous(memory_format=torch.channels_last)
            batch, channels, height, width = rows.shape
            shape = (batch, self.outputs, *self._output_size((height + below, width + below)))
            output = recording.empty(shape, dtype, torch.channels_last)
            added = None if added is None else added.contiguous(memory_format=torch.channels_last)
            sizes = (batch, height, width, channels)
        assert added is None or (added.shape == output.shape and added.dtype is torch.float32)
        out_size = output.shape[2:] if self._is_conv else sizes[1:3]
        self._multiply(rows, quantizer, bias, added, output, (*sizes, *out_size))
        return output

    def codes_of(self, x: Tensor, quantizer: native.Quantizer) -> Tensor:
        """Return the codes of `x`, `(B, I, H, W)` or `(…, I)`, an image as the product reads it."""
        if x.ndim != 4:
            return native.quantize(x, quantizer)
        self._check(x.shape[1], self._inputs)
        return native.quantize(x, quantizer, padded=self._channels)

    def gated(
        self, codes: Tensor, quantizer: tuple[float, int], bias: Tensor | None, wanted: tuple[float, int]
    ) -> Tensor:
        """Return codes of a product of matrices whose outputs are `interleaved`, gated by GELU.

        Args:
            codes: `(…, I)`, with scale and zero point `quantizer`.
            quantizer: of the codes.
            bias: interleaved as the outputs, or None.
            wanted: scale and zero point of the result.

        Returns:
            `(…, O / 2)`, uint8.
        """
        rows = codes.contiguous()
        output = recording.empty((*rows.shape[:-1], self.outputs // 2), torch.uint8)
        sizes = _sizes_of(rows)
        self._multiply(rows, quantizer, bias, None, output, (*sizes, *sizes[1:3]), gate=wanted)
        return output

    def interleaved(self) -> VNNIProduct:
        """Return the same product of matrices with its outputs in the `interleaving` order, for `gated`."""
        order = interleaving(self.outputs)
        copied = copy.copy(self)
        copied._packed = _packed(self._unpacked()[order, :, None, None], vectors=self._vectors)
        copied._scale, copied._sums = self._scale[order].contiguous(), self._sums[order].contiguous()
        return copied

    def _multiply(
        self,
        rows: Tensor,
        quantizer: tuple[float, int],
        bias: Tensor | None,
        added: Tensor | None,
        output: Tensor,
        sizes: tuple[int, ...],
        *,
        gate: tuple[float, int] | None = None,
    ) -> None:
        self._check(sizes[3], self._channels)  # the kernel would read beyond them
        arguments = Product(
            rows.data_ptr(), self._packed.data_ptr(), self._scale.data_ptr(), self._sums.data_ptr(),
            None if bias is None else bias.data_ptr(), None if added is None else added.data_ptr(),
            output.data_ptr(), *sizes, self.outputs, *self._kernel, *self._padding,
            *self._stride, *self._dilation, *quantizer, output.dtype is torch.bfloat16,
            gate is not None, *(gate or (1.0, 0)), self._is_tiled, None,
        )  # fmt: skip
        varying = native.varying_fields(arguments, quantizer)
        if gate is not None:
            varying += native.varying_fields(arguments, gate, ("out_scale", "out_zero_point"))
        if bias is not None:
            varying += native.varying_address(arguments, "bias", bias)
        given = [rows, self._packed, self._scale, self._sums, *(x for x in (bias, added) if x is not None)]
        native.call(Operation.INT8_PRODUCT, arguments, given, [output], varying=varying)

    def _check(self, channels: int, wanted: int) -> None:
        if channels != wanted:
            raise ValueError(f"the input has {channels} channels; the layer reads {wanted}")

    def _unpacked(self) -> Tensor:
        """Return the weight of a product of matrices, `(O, I)`."""
        depth = len(self._packed) // (-(-self.outputs // _LANES) * _LANES)
        panels = self._packed.split(self._vectors * _LANES * depth)
        rows = [
            panel.reshape(depth // CHANNELS_AT_ONCE, -1, CHANNELS_AT_ONCE).transpose(0, 1).flatten(1)
            for panel in panels
        ]
        return torch.cat(rows)[: self.outputs]

    def _output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (
            (size[axis] + 2 * self._padding[axis] - self._dilation[axis] * (self._kernel[axis] - 1) - 1)
            // self._stride[axis]
            + 1
            for axis in (0, 1)
        )
        return height, width


def _padded(kernels: Tensor) -> Tensor:
    """Return a weight `(O, I, kh, kw)` with zeros for the channels that the kernel needs besides."""
    return functional.pad(kernels, (0, 0, 0, 0, 0, -kernels.shape[1] % CHANNELS_AT_ONCE))


def interleaving(outputs: int) -> Tensor:
    """Return the order of outputs in which sixteen values and their sixteen gates lie side by side.

    outputs: values, then as many gates; a multiple of 32.
    """
    return torch.arange(outputs).reshape(2, -1, _LANES).transpose(0, 1).flatten()


def _sizes_of(rows: Tensor) -> tuple[int, int, int, int]:
    """Return batch, height, width and channels of a product of matrices, which has one line of pixels."""
    return 1, 1, rows.numel() // rows.shape[-1], rows.shape[-1]


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
