"""Convolution and linear layers with simulated low-bit weights and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.compress.quantize.quantizers import StepwiseQuantizer
from errata.compress.quantize.scheme import LayerScheme


class Geometry:
    """What a convolution or linear layer does besides its weight; reads a module, computes in float."""

    def __init__(self, module: nn.Conv2d | nn.Linear) -> None:
        self.is_conv = isinstance(module, nn.Conv2d)
        self.stride: Any = getattr(module, "stride", None)
        self.padding: Any = getattr(module, "padding", None)
        self.dilation: Any = getattr(module, "dilation", None)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float layer."""
        if not self.is_conv:
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def split(self, x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """The parts of an input, along its channels."""
        return x.split(list(widths), dim=1 if self.is_conv else -1)

    def quantize_parts(
        self, x: Tensor, widths: Sequence[int], quantizers: Iterable[Callable[[Tensor], Tensor]]
    ) -> Tensor:
        """`x` with each part passed through its own quantizer."""
        parts = zip(quantizers, self.split(x, widths), strict=True)
        return self.join([quantize(part) for quantize, part in parts])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Inverse of `split`."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1 if self.is_conv else -1)


def per_output_channel(scale: Tensor, ndim: int) -> Tensor:
    """A scale `(O,)` shaped to multiply a weight of `ndim` dimensions."""
    return scale.reshape(-1, *([1] * (ndim - 1)))


class SimulatedLayer(nn.Module):
    """A float layer whose weight lies on its integer grid, and whose input passes stepwise quantizers.

    `weight` is the dequantized weight `(O, I, …)`; each part of a split input has its own quantizer.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        weight: Tensor,
        bias: Tensor | None,
        quantizers: Sequence[StepwiseQuantizer],
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, x: Tensor) -> Tensor:
        """The layer on the quantized input; shapes as in the float layer."""
        if self.quantizers:
            x = self.geometry.quantize_parts(x, self.scheme.input_widths, self.quantizers)
        return self.geometry.apply(x, self.weight, self.bias)
