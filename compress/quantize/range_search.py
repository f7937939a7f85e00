"""Choose the scale and zero point of an activation quantizer from the values that it saw."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.runtime.ranges import dequantize, quantize

# Timestep-wise calibration of CacheQuant and EDA-DM (public code): forty shrink factors, error exponent 2.4.
_SHRINK_FACTORS = torch.linspace(1.0, 0.22, 40)
_ERROR_EXPONENT = 2.4
# A range narrower than this is a constant input; any scale serves it.
_SMALLEST_SCALE = 1e-8


def choose_range(values: Tensor, *, bits: int, from_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an asymmetric per-tensor quantizer that fits `values` best.

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
        raise ValueError("no range fits an empty tensor or one with NaN or infinity")
    levels = 2**bits - 1
    factors = _SHRINK_FACTORS.to(flat.device)
    low = torch.zeros_like(factors) if from_zero else flat.min().clamp(max=0) * factors
    high = flat.max().clamp(min=0) * factors
    scale = ((high - low) / levels).clamp(min=_SMALLEST_SCALE)
    zero_point = torch.round(-low / scale).clamp(0, levels)
    column_scale, column_zero = scale[:, None], zero_point[:, None]
    fitted = dequantize(quantize(flat, column_scale, column_zero, bits=bits), column_scale, column_zero)
    error = fitted.sub_(flat).abs_().pow_(_ERROR_EXPONENT).mean(dim=1)
    best = int(error.argmin())
    return scale[best], zero_point[best]
