"""A value at one position from values at others, by polynomials in two bases over divided differences.

    symbol      here            meaning
    s_0, s_1    positions       of the known values, newest first
    F_k         values          at s_k
    f[s_0..s_k] differences     divided differences; f[s_0] = F_0
    x           at              where the value is wanted

Newton: F(x) = Σ_k f[s_0..s_k] Π_{j<k} (x - s_j), the polynomial through all known values.

Scaled Hermite: F(x) = Σ_k f[s_0..s_k] H̃_k(x - s_0), where H̃_k(u) = σ^k H_k(σ u) with the physicists' Hermite
polynomials H_0 = 1, H_1 = 2u, H_2 = 4u² - 2, H_(k+1) = 2u H_k - 2k H_(k-1); u counts steps. At σ = 1/√2 and
order 1 it is Newton's; a smaller σ damps the extrapolation.

The differences depend on the values alone, so they are computed once for all positions until a value changes.

Sources: TaylorSeer (Liu et al., 2025) for the idea, with Newton's divided differences in place of its Taylor
series, which assumes equal intervals; HiCache (Feng et al., 2025), Eq. 9-11, for the other basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def divided_differences(positions: Sequence[float], values: Sequence[Tensor]) -> list[Tensor]:
    """Return f[s_0], f[s_0, s_1], …, as many as values, float32 or wider; positions are all different."""
    wide = torch.promote_types(values[0].dtype, torch.float32)
    column = [value.to(wide) for value in values]
    differences = column[:1]
    for k in range(1, len(positions)):
        column = [
            (column[i] - column[i + 1]) / (positions[i] - positions[i + k]) for i in range(len(column) - 1)
        ]
        differences.append(column[0])
    return differences


class Differences:
    """The divided differences of the latest values, computed again only when a value changes."""

    def __init__(self) -> None:
        self._known: list[tuple[int, Tensor]] = []
        self._differences: list[Tensor] = []

    def of(self, known: Sequence[tuple[int, Tensor]]) -> tuple[list[float], list[Tensor]]:
        """Return positions and divided differences of `(position, value)`, newest first."""
        positions = [float(position) for position, _ in known]
        if not _are_the_same(known, self._known):
            self._known = list(known)
            self._differences = divided_differences(positions, [value for _, value in known])
        return positions, self._differences


def newton_basis(positions: Sequence[float], at: float) -> list[float]:
    """Return Π_{j<k} (x - s_j) for k = 0, 1, …, one for each position."""
    basis = [1.0]
    for position in positions[:-1]:
        basis.append(basis[-1] * (at - position))
    return basis


def hermite_basis(positions: Sequence[float], at: float, *, sigma: float) -> list[float]:
    """Return H̃_k(x - s_0) for k = 0, 1, …, one for each position."""
    u = sigma * (at - positions[0])
    hermite = [1.0, 2 * u]
    for k in range(1, len(positions) - 1):
        hermite.append(2 * u * hermite[k] - 2 * k * hermite[k - 1])
    return [sigma**k * hermite[k] for k in range(len(positions))]


def combined(basis: Sequence[float], differences: Sequence[Tensor]) -> Tensor:
    """Return Σ_k basis_k f[s_0..s_k], for a basis that starts with 1; one pass over memory a term."""
    total = differences[0]
    for weight, difference in zip(basis[1:], differences[1:], strict=True):
        total = torch.add(total, difference, alpha=weight)
    return total


def weighted_sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """Return Σ_k weights_k values_k, float32 or wider; one pass over memory for each value."""
    wide = torch.promote_types(values[0].dtype, torch.float32)
    total = values[0].to(wide) * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        total = torch.add(total, value.to(wide), alpha=weight)
    return total


def _are_the_same(one: Sequence[tuple[int, Tensor]], other: Sequence[tuple[int, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a[0] == b[0] and a[1] is b[1] for a, b in zip(one, other, strict=True)
    )
