"""A value at some position as a weighted sum of values at others: two bases of polynomials.

    symbol      here            meaning
    s_0, s_1    positions       of the known values, newest first
    F_k         (the values)    at s_k
    f[s_0..s_k] (unit vectors)  divided differences, newest first
    x           at              where the value is wanted

Newton: F(x) = Σ_k f[s_0..s_k] Π_{j<k} (x - s_j), the polynomial through all known values.

Scaled Hermite: F(x) = Σ_k f[s_0..s_k] H̃_k(x - s_0), where H̃_k(u) = σ^k H_k(σ u) with the physicists' Hermite
polynomials H_0 = 1, H_1 = 2u, H_2 = 4u² - 2, H_(k+1) = 2u H_k - 2k H_(k-1); u counts steps. At σ = 1/√2 and
order 1 it is Newton's; a smaller σ damps the extrapolation.

Both are linear in the F_k, so only their weights are computed here, as Python numbers.

Sources: TaylorSeer (Liu et al., 2025) for the idea, with Newton's divided differences in place of its Taylor
series, which assumes equal intervals; HiCache (Feng et al., 2025), Eq. 9-11, for the other basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def newton_weights(positions: Sequence[float], at: float) -> list[float]:
    """Weights of the values at `positions` (newest first, all different) in the value at `at`."""
    basis, product = [], 1.0
    for position in positions:
        basis.append(product)
        product *= at - position
    return _weights(positions, basis)


def hermite_weights(positions: Sequence[float], at: float, *, sigma: float) -> list[float]:
    """As `newton_weights`, in the scaled Hermite basis."""
    u = sigma * (at - positions[0])
    hermite = [1.0, 2 * u]
    for k in range(1, len(positions) - 1):
        hermite.append(2 * u * hermite[k] - 2 * k * hermite[k - 1])
    return _weights(positions, [sigma**k * hermite[k] for k in range(len(positions))])


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Σ w_k F_k in the type of the values, summed in float32 or wider."""
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(wide) * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total.add_(value.to(wide), alpha=weight)
    return total.to(values[0].dtype)


def _weights(positions: Sequence[float], basis: Sequence[float]) -> list[float]:
    """Σ_k f[s_0..s_k] basis_k as weights of F_0, F_1, …: f[s_0..s_k] = Σ_i F_i / Π_{j≠i, j≤k} (s_i - s_j)."""
    count = len(positions)
    return [
        sum(
            basis[k] / math.prod(positions[i] - positions[j] for j in range(k + 1) if j != i)
            for k in range(i, count)
        )
        for i in range(count)
    ]
