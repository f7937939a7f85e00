"""Spectral norms of M = s I + f J, for several pairs (s, f) and the one Jacobian J that a `Probe` knows.

Three methods, for small, differentiable and other networks:

- `jacobian`: J column by column, 2 D evaluations for a sample of D numbers, then its singular values. As
  exact as the differences are.
- `lanczos`: with the orthonormal columns of U spanning u, M Mᵀ u, (M Mᵀ)² u, …, ‖Mᵀ U‖ rises to ‖M‖ and never
  exceeds it. A difference (two evaluations) and a gradient an iteration, for every pair. This is power
  iteration on M Mᵀ that remembers where it was, which converges in a fraction of the iterations.
- `arnoldi`: with the orthonormal columns of V spanning v, J v, J² v, …, ‖M V‖ never exceeds ‖M‖. Two
  evaluations an iteration serve all pairs. Without Jᵀ it need not reach the norm; where J is nearly
  symmetric, as a denoiser's is, it comes close.

Source: Golub and Van Loan, "Matrix Computations", chapter 10 (Golub-Kahan-Lanczos, Arnoldi). Every direction
is orthogonalised against all former ones, twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from errata.correct.analysis.probe import Probe
from errata.errors import PlanError

Pair = tuple[float, float]

# Lanczos has converged when no norm grows by more than this part, in two iterations in a row.
_CONVERGED = 1e-5
# A direction is no new one when the rest of it, outside the basis, is shorter than this part of it.
_NOTHING_NEW = 1e-8


def jacobian(probe: Probe, row: int, size: Tensor) -> Tensor:
    """J of sample `row`, `(D, D)`, float64 on the CPU; each coordinate is displaced by ± `size[row]`."""
    eye = torch.eye(probe.dimension, dtype=torch.float64, device=probe.sample.device)
    columns: list[Tensor] = []
    for chunk in eye.split(max(1, probe.batch_size // 2)):  # a central difference evaluates two points
        rows = torch.full((len(chunk),), row, device=eye.device)
        columns.append(probe.push(chunk, rows, size).cpu())
    return torch.cat(columns).T


def jacobian_norms(probe: Probe, pairs: Sequence[Pair], size: Tensor) -> Tensor:
    """The norms `(B, pairs)` by method `jacobian`; memory for one Jacobian at a time."""
    eye = torch.eye(probe.dimension, dtype=torch.float64)
    found: list[list[float]] = []
    for row in range(len(probe.sample)):
        j = jacobian(probe, row, size)
        found.append([float(torch.linalg.matrix_norm(s * eye + f * j, 2)) for s, f in pairs])
    return torch.tensor(found, dtype=torch.float64)


def arnoldi_norms(
    probe: Probe, pairs: Sequence[Pair], size: Tensor, *, iterations: int, generator: Generator
) -> Tensor:
    """Lower bounds `(B, pairs)` by method `arnoldi`; `size` is the length of the displacement of a sample."""
    rows = torch.arange(len(probe.sample), device=probe.sample.device)
    basis = _nothing(len(rows), probe)
    images, v = basis, _random(len(rows), probe, generator)
    for _ in range(min(iterations, probe.dimension)):
        v = _new_direction(v, basis, _random(len(rows), probe, generator))
        image = probe.push(v, rows, size)
        basis, images = _with(basis, v), _with(images, image)
        v = image
    return torch.stack([torch.linalg.matrix_norm(s * basis + f * images, 2) for s, f in pairs], dim=1).cpu()


def lanczos_norms(
    probe: Probe, pairs: Sequence[Pair], size: Tensor, *, iterations: int, generator: Generator
) -> tuple[Tensor, bool]:
    """The norms `(B, pairs)` by method `lanczos`, and whether all converged.

    Every pair of every sample is a row of its own in the network's batch. Directions come from differences,
    what is measured from gradients alone.
    """
    batch, device = len(probe.sample), probe.sample.device
    rows = torch.arange(batch, device=device).repeat_interleave(len(pairs))
    s, f = (
        torch.tensor(values, dtype=torch.float64, device=device).repeat(batch).unsqueeze(1)
        for values in zip(*pairs, strict=True)
    )
    basis = _nothing(len(rows), probe)
    images, v = basis, _unit(_random(len(rows), probe, generator))
    norms, quiet = basis.new_zeros(len(rows)), 0
    for _ in range(min(iterations, probe.dimension)):
        u = s * v + f * probe.push(v, rows, size)
        u = _new_direction(u, basis, _random(len(rows), probe, generator))
        image = s * u + f * probe.pull(u, rows)
        basis, images = _with(basis, u), _with(images, image)
        before, norms = norms, torch.linalg.matrix_norm(images, 2)
        quiet = quiet + 1 if bool((norms - before <= _CONVERGED * norms).all()) else 0
        if quiet == 2:
            break
        v = _unit(image)
    return norms.reshape(batch, len(pairs)).cpu(), quiet == 2 or basis.shape[1] == probe.dimension


def check_gradients(probe: Probe, size: Tensor, generator: Generator) -> None:
    """Compares ⟨w, J v⟩ by differences with ⟨Jᵀ w, v⟩ by gradients, at w = J v.

    Raises:
        PlanError: they differ by more than a tenth; for a network that rounds, the gradient is zero.
    """
    rows = torch.arange(len(probe.sample), device=probe.sample.device)
    v = _unit(_random(len(rows), probe, generator))
    w = probe.push(v, rows, size)
    by_differences, by_gradients = float((w * w).sum()), float((probe.pull(w, rows) * v).sum())
    if not abs(by_gradients - by_differences) <= 0.1 * by_differences:
        raise PlanError(
            f"step {probe.step}: gradients of the network ({by_gradients:.3g}) do not agree with differences "
            f'({by_differences:.3g}), as where it rounds; take method "arnoldi"'
        )


def _new_direction(v: Tensor, basis: Tensor, spare: Tensor) -> Tensor:
    """The unit vectors `(P, D)` along `v` outside `basis` `(P, k, D)`; along `spare` where there is none."""
    rest = _outside(v, basis)
    is_new = torch.linalg.vector_norm(rest, dim=1) > _NOTHING_NEW * torch.linalg.vector_norm(v, dim=1)
    return _unit(torch.where(is_new.unsqueeze(1), rest, _outside(spare, basis)))


def _outside(v: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):  # the second time removes what rounding left
        v = v - torch.einsum("bk,bkd->bd", torch.einsum("bkd,bd->bk", basis, v), basis)
    return v


def _with(vectors: Tensor, v: Tensor) -> Tensor:
    return torch.cat([vectors, v.unsqueeze(1)], dim=1)


def _nothing(count: int, probe: Probe) -> Tensor:
    return torch.empty(count, 0, probe.dimension, dtype=torch.float64, device=probe.sample.device)


def _unit(v: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / length.clamp_min(torch.finfo(v.dtype).tiny)


def _random(count: int, probe: Probe, generator: Generator) -> Tensor:
    drawn = torch.randn(count, probe.dimension, dtype=torch.float64, generator=generator)
    return drawn.to(probe.sample.device)
