"""Histograms of activations whose bins are the same for every tensor, so that they add up without rounding.

A bin holds the floats of one sign that share their exponent and the first six bits of their mantissa: its
width is 1/128 to 1/64 of its values. Bins are ordered by value. The exponents from 2^-48 to 2^79 have bins;
smaller values count as zero, larger ones go into the last bin.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MANTISSA_BITS = 6
_SMALLEST_EXPONENT, _EXPONENTS = -48, 128
_HALF = _EXPONENTS << _MANTISSA_BITS
# Of float32: 23 bits of mantissa, exponents biased by 127.
_SHIFT = 23 - _MANTISSA_BITS
_FIRST = (_SMALLEST_EXPONENT + 127) << _MANTISSA_BITS

BINS = 2 * _HALF


def histogram(x: Tensor) -> Tensor:
    """Return how many values lie in each bin, `(BINS,)`, int64.

    Args:
        x: one-dimensional, float32, float16 or bfloat16.
    """
    bits = x.float().view(torch.int32)
    place = (bits & 0x7FFFFFFF).bitwise_right_shift_(_SHIFT).sub_(_FIRST).clamp_(0, _HALF - 1)
    place ^= bits >> 31  # place p of a negative number becomes -1 - p
    return torch.bincount(place.add_(_HALF), minlength=BINS)


def edges() -> Tensor:
    """Return the borders of the bins, ascending, `(BINS + 1,)`, float32; bin i is from entry i to i + 1."""
    places = torch.arange(_HALF + 1, dtype=torch.int32) + _FIRST
    magnitudes = (places << _SHIFT).view(torch.float32)
    magnitudes[0] = 0.0
    return torch.cat([-magnitudes.flip(0), magnitudes[1:]])
