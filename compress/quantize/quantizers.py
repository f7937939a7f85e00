"""Weight and activation quantizers, built on brevitas, and the choice of an activation range."""

from __future__ import annotations

from typing import Any

import torch
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import IntQuant
from brevitas.nn import QuantConv2d, QuantLinear
from brevitas.quant import Int8WeightPerChannelFloatMSE
from torch import Tensor, nn

from errata.runtime.ranges import at_step, dequantize, quantize
from errata.runtime.step_context import StepContext

# Timestep-wise calibration of CacheQuant and EDA-DM (public code): forty shrink factors, error exponent 2.4.
_SHRINK_FACTORS = torch.linspace(1.0, 0.22, 40)
ERROR_EXPONENT = 2.4
# A range narrower than this is a constant input; any scale serves it.
_SMALLEST_SCALE = 1e-8
_NOTHING_FITS = "no range fits an empty tensor or one with NaN or infinity"


@torch.no_grad()
def quantize_weight(weight: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """Return symmetric per-output-channel codes and scales of a weight, by brevitas' MSE range search.

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


def choose_range(values: Tensor, *, bits: int, from_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point of an asymmetric per-tensor quantizer that fit `values` best.

    Tries 40 ranges, from the full one down to 22 % of it, and keeps the one with the least mean
    `|x - dequantize(quantize(x))|^2.4`. The range always contains zero, so that padding stays exact.

    Args:
        values: any shape, float32; a sample of the activations, extremes included.
        bits: width of the codes.
        from_zero: the values are known to be non-negative (softmax outputs): zero point 0.

    Returns:
        `(scale, zero_point)`, scalars, float32; the zero point is a whole number in `[0, 2^bits - 1]`.

    Raises:
        ValueError: `values` is empty or not finite.

    Source: range search of CacheQuant (Liu et al., CVPR 2025), public code.
    """
    flat = values.flatten().float()
    if flat.numel() == 0 or not bool(torch.isfinite(flat).all()):
        raise ValueError(_NOTHING_FITS)
    scale, zero_point = candidate_ranges(flat.min(), flat.max(), bits=bits, from_zero=from_zero)
    column_scale, column_zero = scale[:, None], zero_point[:, None]
    fitted = dequantize(quantize(flat, column_scale, column_zero, bits=bits), column_scale, column_zero)
    error = fitted.sub_(flat).abs_().pow_(ERROR_EXPONENT).mean(dim=1)
    best = int(error.argmin())
    return scale[best], zero_point[best]


def candidate_ranges(
    low: Tensor, high: Tensor, *, bits: int, from_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points, `(40,)` each, of the ranges that a search tries: the full one first.

    Args:
        low: the least value, a scalar, float32.
        high: the largest one.
        bits: width of the codes.
        from_zero: the values are known to be non-negative: zero point 0.

    Raises:
        ValueError: an extreme is NaN or infinite.
    """
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise ValueError(_NOTHING_FITS)
    levels = 2**bits - 1
    factors = _SHRINK_FACTORS.to(low.device)
    lows = torch.zeros_like(factors) if from_zero else low.clamp(max=0) * factors
    highs = high.clamp(min=0) * factors
    scale = ((highs - lows) / levels).clamp(min=_SMALLEST_SCALE)
    return scale, torch.round(-lows / scale).clamp(0, levels)


class StraightThrough(torch.autograd.Function):
    """`dequantize(quantize(x))`, differentiable: rounding passes gradients on as if it were not there.

    With codes `q`, and `inside` where `round(x/s + z)` is a code and not clipped to one:

        ∂y/∂x = inside
        ∂y/∂s = (q - z) - inside x/s

    In one function: through the single operations it takes twice the time and three times the memory. The
    values are those of `errata.runtime.ranges`, to the last bit.

    Source: LSQ (Esser et al., ICLR 2020), equation 3, with a zero point.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        """Return `x` on the grid; `x` has any shape, `scale` and `zero_point` broadcast to it."""
        ratio = x.float() / scale
        rounded = (ratio + zero_point).round_()
        outside = (rounded < 0).logical_or_(rounded > 2**bits - 1)
        centred = rounded.clamp_(0, 2**bits - 1).sub_(zero_point)
        ctx.save_for_backward(torch.sub(centred, ratio.masked_fill_(outside, 0), out=ratio), outside)
        ctx.scale_shape = scale.shape
        return centred.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of `x` and `scale`, where they are asked for."""
        slope, outside = ctx.saved_tensors
        (upstream,) = gradients
        wants_x, wants_scale = ctx.needs_input_grad[:2]
        return (
            upstream.masked_fill(outside, 0) if wants_x else None,
            slope.mul_(upstream).sum_to_size(ctx.scale_shape) if wants_scale else None,
            None,
            None,
        )


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
        """Return `x` quantized and dequantized, same shape."""
        step = self.context.step
        scale, zero_point = at_step(self.scale, step, x), at_step(self.zero_point, step, x)
        if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):  # its scale is being learned
            learned: Tensor = StraightThrough.apply(x, scale, zero_point, self.num_bits)
            return learned
        result: Tensor = self.quantizer(scale, zero_point, self.bits, x)
        return result
