"""Simulated quantization of activations with gradients for the input and for the scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """`dequantize(quantize(x))`, differentiable: rounding passes gradients on as if it were not there.

    With codes `q`, and `inside` where `round(x/s + z)` is a code and not clipped to one:

        ∂y/∂x = inside
        ∂y/∂s = (q - z) - inside x/s

    In one function: through the single operations it takes twice the time and three times the memory. The
    values are those of `errata.compress.quantize.range_search`, to the last bit.

    Source: LSQ (Esser et al., ICLR 2020), equation 3, with a zero point.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
        """`x` of any shape; `scale` and `zero_point` broadcast to it."""
        ratio = x / scale
        rounded = torch.round(ratio + zero_point)
        codes = rounded.clamp(0, 2**bits - 1)
        outside = codes != rounded
        centred = codes - zero_point
        ctx.save_for_backward(centred - ratio.masked_fill_(outside, 0), outside)
        ctx.scale_shape = scale.shape
        return centred * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients of `x` and `scale`, where they are asked for."""
        slope, outside = ctx.saved_tensors
        (upstream,) = gradients
        wants_x, wants_scale = ctx.needs_input_grad[:2]
        return (
            upstream.masked_fill(outside, 0) if wants_x else None,
            (upstream * slope).sum_to_size(ctx.scale_shape) if wants_scale else None,
            None,
            None,
        )
