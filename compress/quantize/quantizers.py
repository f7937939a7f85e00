"""Weight and activation quantizers, built on brevitas."""

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import IntQuant
from brevitas.nn import QuantConv2d, QuantLinear
from brevitas.quant import Int8WeightPerChannelFloatMSE
from torch import Tensor, nn

from errata.compress.rounding.straight_through import StraightThrough
from errata.runtime.ranges import at_step
from errata.runtime.step_context import StepContext


@torch.no_grad()
def quantize_weight(weight: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric per-output-channel codes and scales of a weight, by brevitas' MSE range search.

    Args:
        weight: `(O, I)` or `(O, I, kh, kw)`, float32.
        bits: of a weight format; codes lie in `[-(2^(bits-1) - 1), 2^(bits-1) - 1]`.

    Returns:
        `codes`, int8, of the weight's shape, and `scale`, float32, `(O,)`.
    """
    layer: Any
    if weight.ndim == 4:
        layer = QuantConv2d(
            weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]), bias=False,
            weight_quant=Int8WeightPerChannelFloatMSE, weight_bit_width=bits,
        )  # fmt: skip
    else:
        layer = QuantLinear(
            weight.shape[1], weight.shape[0], bias=False,
            weight_quant=Int8WeightPerChannelFloatMSE, weight_bit_width=bits,
        )  # fmt: skip
    layer.weight.data.copy_(weight)
    quantized = layer.eval().quant_weight()
    return quantized.int().to(torch.int8), quantized.scale.flatten().float()


class StepwiseQuantizer(nn.Module):
    """Simulated asymmetric activation quantizer with one scale and zero point per sampling step.

    Buffers `scale` and `zero_point`, float32, `(T,)`. The output is floating point, on the grid of the step
    that the context holds; rows of several steps may run together.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, *, bits: int, context: StepContext) -> None:
        super().__init__()
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", scale.clone())  # its own: learning writes to it
        self.register_buffer("zero_point", zero_point.clone())
        self.num_bits = bits
        self.register_buffer("bits", torch.tensor(float(bits)))
        self.context = context
        self.quantizer = IntQuant(narrow_range=False, signed=False, input_view_impl=Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Quantized and dequantized `x`, same shape."""
        step = self.context.step
        scale, zero_point = at_step(self.scale, step, x), at_step(self.zero_point, step, x)
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):  # its scale is being learned
            learned: Tensor = StraightThrough.apply(x, scale, zero_point, self.num_bits)
            return learned
        result: Tensor = self.quantizer(scale, zero_point, self.bits, x)
        return result
