"""Activation ranges as a network reads them: quantize, dequantize, and the entry of a per-step table.

Symbols: `s` scale (multiplies codes back to reals), `z` zero point, `q` code in `[0, 2^b - 1]`.
"""

from __future__ import annotations

from torch import Tensor


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int) -> Tensor:
    """Return codes `q = clamp(round(x / s + z), 0, 2^bits - 1)` as a float tensor of the shape of `x`.

    The zero point is added before rounding, as brevitas' `IntQuant` does, so that both agree to the last bit.
    """
    # In place on a tensor of its own: fresh memory for each operation would take most of the time.
    return (x / scale).add_(zero_point).round_().clamp_(0, 2**bits - 1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the reals `s (q - z)`."""
    return (codes - zero_point).mul_(scale)


def at_step(values: Tensor, step: int | Tensor, x: Tensor) -> Tensor:
    """Return the entry of a per-step table `(T,)` for `x`: a scalar, or one value per row, shaped to `x`.

    Rows may have been split further (the heads of an attention): every row of the batch then stands for
    several neighbouring rows of `x`.
    """
    if isinstance(step, int):
        return values[step]
    rows = values[step].repeat_interleave(x.shape[0] // step.shape[0])
    return rows.reshape(-1, *([1] * (x.ndim - 1)))
