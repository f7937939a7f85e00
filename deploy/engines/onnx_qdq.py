"""Layers whose scales are constants, for engines that build int8 kernels from quantize/dequantize pairs.

OpenVINO and TensorRT fix the scale of an activation when they build. A step's scale s and zero point z are
arithmetic around a constant pair of scale 1, so that one graph serves every step:

    u = int8(round(x / s + z) - 128)   of x padded with zeros, so that the convolution pads nothing
    y = s conv(u, s_w w) + b + s (128 - z) s_w sum w
"""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from errata.deploy.engines.onnx_layers import StepTables, attend, sizes_of
from errata.deploy.engines.onnx_nodes import Dequantized, Int8Grid
from errata.runtime.attention import QuantizedAttention
from errata.runtime.layers import Geometry

_MIDDLE = 128  # of the codes, which an int8 shifts to zero


class QDQPart(nn.Module):
    """The product of one part of an input with the weight of that part."""

    def __init__(self, geometry: Geometry, codes: Tensor, weight_scale: Tensor, tables: StepTables) -> None:
        super().__init__()
        self.geometry = geometry
        self.codes: Tensor
        self.weight_scale: Tensor
        self.sums: Tensor
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("weight_scale", weight_scale.contiguous())
        self.register_buffer("sums", codes.flatten(1).sum(dim=1).float() * weight_scale)
        self.tables = tables

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product at the current step."""
        scale, zero_point = self.tables.now()
        if self.geometry.is_conv:
            (top, left) = self.geometry.padding
            x = functional.pad(x, (left, left, top, top)) if top or left else x
        weight = Dequantized.apply(self.codes, self.weight_scale)
        product = self._multiplied(shifted(x, scale, zero_point), weight)
        constant = self.sums * (scale * (_MIDDLE - zero_point))
        constant = constant if bias is None else constant + bias
        return product * scale + (constant[:, None, None] if self.geometry.is_conv else constant)

    def _multiplied(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.geometry.is_conv:
            return functional.linear(x, weight)
        return functional.conv2d(x, weight, None, self.geometry.stride, 0, self.geometry.dilation)


class QDQAttention(QuantizedAttention):
    """Attention on the scheme's grid, its products in floating point: both zero points differ from 0."""

    def __init__(
        self, *, query: StepTables, key: StepTables, value: StepTables, probabilities: StepTables
    ) -> None:
        super().__init__(query=_Grid(query), key=_Grid(key), value=_Grid(value), probabilities=None)
        self.on_grid = _Grid(probabilities)

    def _attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        return attend(attn, query, key, value, mask, on_grid=self.on_grid)


class _Grid(nn.Module):
    """An activation quantized and dequantized with the scale of the current step."""

    def __init__(self, tables: StepTables) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid of the current step, same shape."""
        scale, zero_point = self.tables.now()
        result: Tensor = (shifted(x, scale, zero_point) - (zero_point - _MIDDLE)) * scale
        return result


def shifted(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the codes of `x` less 128, as whole floating-point numbers.

    Rounded with the zero point added, as `quantize` does, and before 128 is taken off: of a sum with other
    digits too many would be rounded the other way.
    """
    codes: Any = Int8Grid.apply((x / scale + zero_point).round() - _MIDDLE, sizes_of(x))
    result: Tensor = codes
    return result
