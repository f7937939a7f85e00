"""The prediction of one sampler step as a function of the sample, near the trajectory of a run.

symbol    here              meaning
x_t       sample            the sample that the step started from, as the pipeline holds it
ε(x, t)   predict           the prediction, guided as the pipeline guides, of the scheduler's own kind
A_t, B_t  coefficients      the deterministic step is x_{t-1} = A_t x_t + B_t ε(x_t, t)
J_t       push (J v), pull (Jᵀ w)   ∂ε/∂x at x_t

Spectral norms of M = s I + f J, for several pairs (s, f) and the Jacobian J of a `Probe`.

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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from errata.correct.guidance import Guidance
from errata.correct.noise_levels import NoiseLevels
from errata.errors import ErrataError, PlanError
from errata.runtime.denoiser import Denoiser, UNetDenoiser
from errata.runtime.run import UNetCall

Full = Callable[[Tensor, int, Mapping[str, Tensor]], Tensor]
"""A full evaluation: the network's input, the call and its conditioning; the prediction alone."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One step of a run; rows of a batch stand for displaced copies of its samples, in any order and number.

    Attributes:
        calls: the denoiser calls of the step: one, or two where guidance takes two.
        sample: x_t, `(B, …)`.
        guidance: what the pipeline did around the network.
        levels: noise levels of the run.
        denoiser: whose full calls are probed.
        batch_size: most rows of one denoiser call.
    """

    calls: tuple[UNetCall, ...]
    sample: Tensor
    guidance: Guidance
    levels: NoiseLevels
    denoiser: Denoiser
    batch_size: int

    @property
    def step(self) -> int:
        """Index of the (first) denoiser call."""
        return self.calls[0].step

    @property
    def dimension(self) -> int:
        """Numbers in one sample, D."""
        return self.sample[0].numel()

    @property
    def rms(self) -> Tensor:
        """Root mean square of each sample, `(B,)`, float64."""
        return self.sample.flatten(1).double().square().mean(dim=1).sqrt()

    def coefficients(self) -> tuple[float, float]:
        """Return A_t and B_t of the deterministic DDIM step from here to the next.

        For a network that predicts ε, A = a'/a and B = b' - b A, with the signal a and the noise b before the
        step, a' and b' after it; for other kinds of prediction, what follows from them.

        Source: "Iterative Error Correction", Eq. 5.
        """
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        to = self.step + len(self.calls)
        a = self.levels.jump(one, zero, self.step, to)
        b = self.levels.jump(zero, one, self.step, to)
        return float(a), float(b)

    def predict(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return ε at `points`, `(P, D)` in and out, float64; point i belongs to sample `rows[i]`."""
        return torch.cat([self._guided(self._full, x, own) for x, own in self._chunks(points, rows)])

    def push(self, directions: Tensor, rows: Tensor, size: Tensor) -> Tensor:
        """Return J v by central differences, `(P, D)`, for unit directions; sample j moves by ± `size[j]`.

        Raises:
            ErrataError: a prediction is not finite.
        """
        x = self.sample.flatten(1).double()[rows]
        h = size[rows].unsqueeze(1)
        points = torch.cat([x + h * directions, x - h * directions])
        ahead, behind = self.predict(points, rows.repeat(2)).chunk(2)
        pushed = (ahead - behind) / (2 * h)
        if not bool(pushed.isfinite().all()):
            raise ErrataError(
                f"step {self.step}: the denoiser returned NaN or infinite values near its own "
                "trajectory; sample once without analysis to see whether the artifact alone does it too"
            )
        return pushed

    def pull(self, cotangents: Tensor, rows: Tensor) -> Tensor:
        """Return Jᵀ w by automatic differentiation, `(P, D)`.

        Raises:
            PlanError: the denoiser has no network that gradients pass through.
        """
        full = self._differentiable()
        pulled: list[Tensor] = []
        for w, own in self._chunks(cotangents, rows):
            with torch.inference_mode(False), torch.enable_grad():
                x = self.sample.flatten(1).double()[own].clone().requires_grad_(True)
                value = self._guided(full, x, own)
                pulled.append(torch.autograd.grad((value * w).sum(), x)[0])
        return torch.cat(pulled)

    def _chunks(self, points: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = max(1, self.batch_size // self.guidance.copies)
        return list(zip(points.split(size), rows.split(size), strict=True))

    def _guided(self, full: Full, points: Tensor, rows: Tensor) -> Tensor:
        x = points.to(self.sample.dtype).reshape(-1, *self.sample.shape[1:])
        scaled = self.levels.scaled(x, self.step)
        raws = [self._raw(full, scaled, rows, call) for call in self.calls]
        wide = torch.promote_types(raws[0].dtype, torch.float32)
        return self.guidance.prediction([raw.to(wide) for raw in raws], x).flatten(1).double()

    def _raw(self, full: Full, scaled: Tensor, rows: Tensor, call: UNetCall) -> Tensor:
        cond = self.guidance.conditioning(rows, call)
        return full(self.guidance.expand(scaled, rows, call), call.step, cond)

    def _full(self, x: Tensor, step: int, cond: Mapping[str, Tensor]) -> Tensor:
        return self.denoiser.full(x, step, cond)[0]

    def _differentiable(self) -> Full:
        denoiser = self.denoiser
        if not isinstance(denoiser, UNetDenoiser):
            raise PlanError(
                f"a {type(denoiser).__name__} has no network that gradients pass through; use "
                'method "arnoldi" for a lower bound'
            )

        def full(x: Tensor, step: int, cond: Mapping[str, Tensor]) -> Tensor:
            # `UNetDenoiser.full` forbids gradients; a network without quantizers needs no step context.
            return denoiser.unet.full(x, denoiser.timesteps[step], cond, branch=0)[0]

        return full


Pair = tuple[float, float]

# Lanczos has converged when no norm grows by more than this, relatively, twice in a row.
_CONVERGED = 1e-5
# A direction is not new if its part outside the basis is shorter than this, relative to it.
_NOTHING_NEW = 1e-8


def jacobian(probe: Probe, row: int, size: Tensor) -> Tensor:
    """Return J of sample `row`, `(D, D)`, float64 on the CPU; each coordinate moves by ± `size[row]`."""
    eye = torch.eye(probe.dimension, dtype=torch.float64, device=probe.sample.device)
    columns: list[Tensor] = []
    for chunk in eye.split(max(1, probe.batch_size // 2)):  # a central difference evaluates two points
        rows = torch.full((len(chunk),), row, device=eye.device)
        columns.append(probe.push(chunk, rows, size).cpu())
    return torch.cat(columns).T


def jacobian_norms(probe: Probe, pairs: Sequence[Pair], size: Tensor) -> Tensor:
    """Return the norms `(B, pairs)` by method `jacobian`, with memory for one Jacobian at a time."""
    eye = torch.eye(probe.dimension, dtype=torch.float64)
    found: list[list[float]] = []
    for row in range(len(probe.sample)):
        j = jacobian(probe, row, size)
        found.append([float(torch.linalg.matrix_norm(s * eye + f * j, 2)) for s, f in pairs])
    return torch.tensor(found, dtype=torch.float64)


def arnoldi_norms(
    probe: Probe, pairs: Sequence[Pair], size: Tensor, *, iterations: int, generator: Generator
) -> Tensor:
    """Return lower bounds `(B, pairs)` by method `arnoldi`; each sample is displaced by its `size`."""
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
    """Return the norms `(B, pairs)` by method `lanczos`, and whether all converged.

    Every pair of every sample is a row of its own in the network's batch. Directions come from differences,
    the norms from gradients alone.
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
    """Check that ⟨w, J v⟩ by differences agrees with ⟨Jᵀ w, v⟩ by gradients, at w = J v.

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
            f'({by_differences:.3g}), because it rounds; use method "arnoldi"'
        )


def _new_direction(v: Tensor, basis: Tensor, spare: Tensor) -> Tensor:
    """Return unit vectors `(P, D)` along `v` outside `basis` `(P, k, D)`, or else along `spare`."""
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
