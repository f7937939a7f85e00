"""CPU int8 backend: oneDNN convolutions and linear layers, uint8 activations by int8 symmetric weights.

One packed weight serves every sampling step: scale and zero point of the activation are given at run time.
Packed layouts are made at load and never stored.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from errata.compress.network.clock import StepClock
from errata.compress.quantize.layers import Geometry
from errata.compress.quantize.scheme import LayerScheme

_NO_POST_OP: tuple[str, list[Any], str] = ("none", [], "")


def is_available() -> bool:
    """Whether this CPU multiplies uint8 by int8 without saturating (AVX512-VNNI or AVX-VNNI)."""
    return bool(torch.cpu._is_vnni_supported()) and hasattr(torch.ops.onednn, "qconv_pointwise")


def quantize_to_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Codes of `x`, uint8, same shape: one fused pass.

    `torch.quantize_per_tensor` is deprecated (torch 2.13 still has it) but faster than tensor operations,
    which take its place where it is gone. NaN has no code: unlike the reference, int8 does not pass it on.
    """
    if hasattr(torch, "quantize_per_tensor"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
        # The bytes of the quantized tensor, seen as uint8: `int_repr` would copy them.
        return torch.empty(0, dtype=torch.uint8).set_(
            codes.untyped_storage(), 0, codes.size(), codes.stride()
        )
    return x.div(scale).add_(zero_point).round_().clamp_(0, 255).to(torch.uint8)


class StepTable:
    """Scale and zero point of one activation quantizer by step, as Python numbers."""

    def __init__(self, scale: Tensor, zero_point: Tensor, clock: StepClock) -> None:
        self._scale: list[float] = scale.tolist()
        self._zero_point: list[int] = zero_point.tolist()
        self._clock = clock

    def now(self) -> tuple[float, int]:
        """The pair of the current step."""
        return self._scale[self._clock.step], self._zero_point[self._clock.step]


class OneDNNQuantizer(nn.Module):
    """Quantizes and dequantizes an activation (query, key and value of an attention)."""

    def __init__(self, table: StepTable) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid of the current step."""
        scale, zero_point = self.table.now()
        codes = quantize_to_uint8(x, scale, zero_point)
        return (codes.to(x.dtype) - zero_point) * scale


class OneDNNLayer(nn.Module):
    """Convolution or linear layer on oneDNN int8 kernels.

    A split input is computed part by part; the second product is added in the kernel (post-op "sum").
    """

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        tables: list[StepTable],
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.tables = tables
        self.bias = bias
        self.weight_scale = [scale.contiguous() for scale in weight_scale]
        self.weight_zero_point = torch.zeros(codes.shape[0], dtype=torch.int64)
        parts = codes.split(list(scheme.input_widths), dim=1)
        self.packed = [
            self._pack(part.contiguous(), scale) for part, scale in zip(parts, weight_scale, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """Same shapes as the float layer; float32, channels_last from a convolution."""
        parts = self.geometry.split(x, self.scheme.input_widths)
        output = self._product(0, parts[0], self.bias)
        for part in range(1, len(parts)):
            output = self._add_product(part, parts[part], output)
        return output

    def _pack(self, codes: Tensor, scale: Tensor) -> Tensor:
        packed: Tensor
        if self.geometry.is_conv:
            packed = torch.ops.onednn.qconv_prepack(codes, scale, 1.0, 0, *self._shape(), None)
        else:
            packed = torch.ops.onednn.qlinear_prepack(codes, None)
        return packed

    def _shape(self) -> tuple[list[int], list[int], list[int], int]:
        geometry = self.geometry
        return list(geometry.stride), list(geometry.padding), list(geometry.dilation), 1

    def _weight(self, part: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.packed[part], self.weight_scale[part], self.weight_zero_point

    def _product(self, part: int, x: Tensor, bias: Tensor | None) -> Tensor:
        scale, zero_point = self.tables[part].now()
        codes = quantize_to_uint8(x, scale, zero_point)
        inputs = (codes, scale, zero_point, *self._weight(part), bias)
        output: Tensor
        if self.geometry.is_conv:
            output = torch.ops.onednn.qconv_pointwise(
                *inputs, *self._shape(), 1.0, 0, torch.float32, *_NO_POST_OP
            )
        else:
            output = torch.ops.onednn.qlinear_pointwise(*inputs, 1.0, 0, torch.float32, *_NO_POST_OP)
        return output

    def _add_product(self, part: int, x: Tensor, output: Tensor) -> Tensor:
        if not self.geometry.is_conv:
            return output + self._product(part, x, None)
        scale, zero_point = self.tables[part].now()
        codes = quantize_to_uint8(x, scale, zero_point)
        inputs = (codes, scale, zero_point, *self._weight(part), output, None)
        result: Tensor = torch.ops.onednn.qconv2d_pointwise.binary(
            *inputs, *self._shape(), 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, None, [], None
        )
        return result
