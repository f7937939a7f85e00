"""The choice of an activation range from a histogram: as `choose_range`, without the values.

Within a bin, values count as spread evenly, so the mean error of a bin has a closed form, also where the bin
is wider than a step of the grid. With `u = x / s`, on the grid of whole numbers from `-z` to `L - z`, `n` the
nearest of those, `r = u - n` and the error `|r|^p`:

    G(u) = ∫ |r|^p du = 2n h^(p+1) / (p+1) + sign(r) |r|^(p+1) / (p+1),    h = 1/2

    mean error of a bin from a to b = s^p (G(b/s) - G(a/s)) / (b/s - a/s)
"""

from __future__ import annotations

import torch
from torch import Tensor

from errata.compress.quantize.histogram import BINS, edges
from errata.compress.quantize.quantizers import ERROR_EXPONENT, candidate_ranges

# What is nearer to zero than half the narrowest scale, every candidate rounds to zero, at the same error. So
# bins in there make one.
_INNER_PART = 1 / 2
# An extreme weighs as one of so many values, as in an exact search on a sample and its extremes. It keeps a
# rare large value from being cut off.
_VALUES_PER_EXTREME = 16384
_EDGES = edges()


@torch.no_grad()
def choose_range_by_histogram(
    counts: Tensor, low: Tensor, high: Tensor, *, bits: int, from_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point that fit a histogram best, as `choose_range` does for values.

    Args:
        counts: `(BINS,)`, of at least one value; see `errata.compress.quantize.histogram`.
        low: the least value, a scalar.
        high: the largest value, a scalar.
        bits: width of the codes.
        from_zero: the values are known to be non-negative: zero point 0.

    Returns:
        `(scale, zero_point)`, scalars, float32.

    Raises:
        ValueError: an extreme is not finite.
    """
    low, high = low.float(), high.float()
    scale, zero_point = candidate_ranges(low, high, bits=bits, from_zero=from_zero)
    a, b, weight = _bins(counts, inner=float(scale.min()) * _INNER_PART)
    s, z = scale[:, None], zero_point[:, None]
    top = 2**bits - 1 - z
    borders = torch.cat([a, b[-1:]])
    change = _error_integral(borders / s, -z, top).diff(dim=1)
    error = change @ (weight / (b - a)) * scale
    extremes = torch.stack([low, high]) / s
    rest = extremes - extremes.round().clamp(-z, top)
    error += rest.abs().pow(ERROR_EXPONENT).sum(dim=1) * (weight.sum() / _VALUES_PER_EXTREME)
    best = int((error * scale.pow(ERROR_EXPONENT)).argmin())
    return scale[best], zero_point[best]


def _bins(counts: Tensor, *, inner: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower and upper ends and counts of neighbouring bins; of those near zero one on each side."""
    middle, distance = BINS // 2, max(1, int((_EDGES[BINS // 2 :] <= inner).sum()) - 1)
    first, last = (int(index) for index in counts.nonzero()[[0, -1], 0])
    left, right = middle - distance, middle + distance
    inside = [counts[left:middle].sum(), counts[middle:right].sum()]
    below, above = counts[min(first, left) : left], counts[right : max(last + 1, right)]
    weight = torch.cat([below, torch.stack(inside), above]).float()
    borders = torch.cat(
        [
            _EDGES[min(first, left) : left + 1],
            _EDGES[middle : middle + 1],
            _EDGES[right : max(last + 1, right) + 1],
        ]
    )
    return borders[:-1], borders[1:], weight


def _error_integral(u: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Return G of the module's docstring."""
    power = ERROR_EXPONENT + 1
    nearest = u.round().clamp_(lowest, highest)
    rest = u - nearest
    tail = rest.abs().pow_(power).copysign_(rest)
    return nearest.mul_(2 * 0.5**power).add_(tail).div_(power)
