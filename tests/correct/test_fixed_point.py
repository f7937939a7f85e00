"""IEC on denoisers whose Jacobian is known: the rate, the limit, and the bound of Eq. 20.

One DDIM step is corrected, the first of four. At the others the denoiser says 0, and DDIM steps then only
scale, so the last sample divided by that scale is the iterate x_{t-1}^(K).

    x, y     x_t and x_{t-1}, as rows
    A, B     of the corrected step, by their formulas
    M        Jacobian of a linear denoiser
    G        (1-λ) I + λ B M: what Eq. 10 does to the distance from the fixed point
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Generator, Tensor

from errata.correct import IEC, CorrectedPipeline, Plan, wrap
from errata.deploy import DeployedPipeline

Deploy = Callable[..., DeployedPipeline]
Denoiser = Callable[[Tensor], Tensor]
Matrix = Callable[[Tensor], Tensor]

N, STEPS, TRAINED = 16, 4, 1000
ALPHA_BAR = [math.exp(-2.0 * (t + 1) / TRAINED) for t in range(TRAINED)]
NOW, AFTER = ALPHA_BAR[750], ALPHA_BAR[500]
A = math.sqrt(AFTER / NOW)
B = math.sqrt(1 - AFTER) - math.sqrt(AFTER * (1 - NOW) / NOW)
I = torch.eye(N, dtype=torch.float64)
# One eigenvalue stands apart at either end, so a single one soon decides at every λ.
SPECTRUM = torch.cat([torch.tensor([-1.0, 1.6]), torch.linspace(0.1, 0.8, N - 2)]).double()


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=Generator().manual_seed(seed))


def symmetric(spectrum: Tensor) -> Tensor:
    basis = torch.linalg.qr(random(N, N, seed=1))[0]
    return basis @ torch.diag(spectrum) @ basis.T


def oblique(spectrum: Tensor) -> Tensor:
    basis = I + 0.1 * random(N, N, seed=2)
    return basis @ torch.diag(spectrum) @ torch.linalg.inv(basis)


def spectral_radius(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).abs().max())


def gradient(λ: float, M: Tensor) -> Tensor:
    return (1 - λ) * I + λ * B * M


Run = Callable[..., tuple[Tensor, CorrectedPipeline]]


@pytest.fixture
def run(deploy_closed_form: Deploy) -> Run:
    """`run(denoiser, x, λ, K, tolerance=0.0)`: the iterate, as rows, and the pipeline with its stats."""

    def run(
        denoiser: Denoiser, x: Tensor, λ: float, K: int, *, tolerance: float = 0.0
    ) -> tuple[Tensor, CorrectedPipeline]:
        scheduler = DDIMScheduler(num_train_timesteps=TRAINED, clip_sample=False)
        scheduler.alphas_cumprod = torch.tensor(ALPHA_BAR, dtype=torch.float64)
        deployed = deploy_closed_form(
            lambda z, step: denoiser(z.flatten(1)).view_as(z) if step == 0 else torch.zeros_like(z),
            scheduler,
            STEPS,
        )
        corrected = wrap(deployed, Plan(IEC(step_size=λ, iterations=K, tolerance=tolerance), steps="0"))
        last = corrected(latents=x.view(-1, 1, 4, 4))
        return last.flatten(1) * math.sqrt(AFTER), corrected

    return run


matrices = pytest.mark.parametrize("make", [symmetric, oblique])


@matrices
@pytest.mark.parametrize(("λ", "K"), [(0.1, 150), (0.3, 30), (0.5, 30), (0.8, 30), (1.0, 30)])
def test_residuals_fall_at_the_predicted_rate(run: Run, make: Matrix, λ: float, K: int) -> None:
    """By the spectral radius of G in each iteration; with another λ, or without B, it is far off."""
    M = make(SPECTRUM)
    rate, tolerance = spectral_radius(gradient(λ, M)), 2e-4
    stats = run(lambda z: z @ M.T, random(3, N, seed=3), λ, K)[1].stats.steps[0]
    assert stats.iterations == (K, K, K)
    for residuals in stats.residuals:
        assert residuals[29] / residuals[28] == pytest.approx(rate, rel=0.01)
        assert residuals[-1] / residuals[-2] == pytest.approx(rate, rel=tolerance)
    for wrong in (gradient(1.1 * λ, M), gradient(λ, M / B)):
        assert abs(spectral_radius(wrong) / rate - 1) > 10 * tolerance


@pytest.mark.parametrize("λ", [0.5, 1.0])
def test_a_nonlinear_denoiser_converges_by_its_jacobian_at_the_limit(run: Run, λ: float) -> None:
    """tanh(M z + c) has the Jacobian diag(1 - tanh²) M, which differs from M and from that at x_t."""
    M, c, x = oblique(3 * SPECTRUM), random(N, seed=4), random(1, N, seed=5)

    def jacobian(z: Tensor) -> Tensor:
        return torch.diag(1 - torch.tanh(z[0] @ M.T + c) ** 2) @ M

    y, corrected = run(lambda z: torch.tanh(z @ M.T + c), x, λ, 40)
    [residuals] = corrected.stats.steps[0].residuals
    measured, tolerance = residuals[-1] / residuals[-2], 5e-3
    assert measured == pytest.approx(spectral_radius(gradient(λ, jacobian(y))), rel=tolerance)
    for wrong in (M, jacobian(x)):
        assert abs(spectral_radius(gradient(λ, wrong)) / measured - 1) > 10 * tolerance


@matrices
@pytest.mark.parametrize("λ", [0.1, 0.5, 1.0])
def test_iterates_in_closed_form(run: Run, make: Matrix, λ: float) -> None:
    """x^(K) = y + G^K (x^(0) - y), y the fixed point; every K from 1 to 30."""
    M, x = make(SPECTRUM), random(2, N, seed=3)
    y, gap = fixed_point(M, x), A * x + B * x @ M.T - fixed_point(M, x)
    for K in range(1, 31):
        gap = gap @ gradient(λ, M).T
        assert_same(run(lambda z: z @ M.T, x, λ, K)[0], y + gap, 1e-12)


def test_full_steps_are_picards(run: Run) -> None:
    """λ = 1: x^(K) = (I + B M + … + (B M)^K) A x + (B M)^(K+1) x; the sum is the limit's Neumann series."""
    M, x = symmetric(SPECTRUM), random(2, N, seed=3)
    total, power = A * x, x @ (B * M).T
    for K in range(1, 9):
        total, power = A * x + total @ (B * M).T, power @ (B * M).T
        assert_same(run(lambda z: z @ M.T, x, 1.0, K)[0], total + power, 1e-12)


@matrices
@pytest.mark.parametrize("λ", [0.1, 0.5, 1.0])
def test_the_limit_solves_the_linear_system(run: Run, make: Matrix, λ: float) -> None:
    """(I - B M) y = A x, whatever λ; x_{t-1} of the plain step is another one."""
    M, x = make(SPECTRUM), random(2, N, seed=3)
    y, corrected = run(lambda z: z @ M.T, x, λ, 1000, tolerance=1e-12)
    assert max(corrected.stats.iterations) < 500
    assert_same(y, fixed_point(M, x), 1e-8)
    for wrong in (A * x + B * x @ M.T, fixed_point(-M, x), fixed_point(M, x / A)):
        assert distance(wrong, y) > 1e-2


def test_a_sample_that_diverges_keeps_the_iterate_that_it_had(run: Run) -> None:
    """The guard: its second move is the longer one, so x^(1) stays; its neighbour converges as ever."""
    spectrum = SPECTRUM.clone()
    spectrum[1] = 12.0
    M, λ, K = symmetric(spectrum), 0.5, 12
    assert spectral_radius(gradient(λ, M)) > 1.5
    wild = random(N, seed=3)
    top = torch.linalg.eigh(M).eigenvectors[:, -1]
    x = torch.stack([wild, wild - (wild @ top) * top])  # the second has nothing of what diverges
    with pytest.warns(RuntimeWarning, match="residual of a correction grew beyond its first") as warned:
        y, corrected = run(lambda z: z @ M.T, x, λ, K)
    assert len(warned) == 1
    stats = corrected.stats.steps[0]
    assert stats.diverged == (True, False)
    assert stats.iterations == (2, K)
    assert stats.residuals[0][1] > stats.residuals[0][0]
    start = A * x + B * x @ M.T
    moved = start + λ * (A * x + B * start @ M.T - start)
    assert_same(y[:1], moved[:1], 1e-12)
    G = torch.linalg.matrix_power(gradient(λ, M), K)
    limit = fixed_point(M, x)
    assert_same(y[1:], (limit + (start - limit) @ G.T)[1:], 1e-9)


@dataclass(frozen=True)
class Bound:
    """Eq. 20 with its parts, from which wrong ones can be made."""

    M: Tensor
    λ: float
    x: Tensor
    delta: Tensor
    """δ_t"""
    error: Tensor
    """ε_θ^δ"""

    @property
    def ideal(self) -> Tensor:
        """x_{t-1} without any error."""
        return A * self.x + B * self.x @ self.M.T

    @property
    def L(self) -> float:
        return float(torch.linalg.matrix_norm(gradient(self.λ, self.M), 2))

    @property
    def moved(self) -> float:
        """The part of C that stays when nothing is wrong: ‖B (ε(x_{t-1}) - ε(x_t))‖."""
        return float(torch.linalg.vector_norm(B * (self.ideal - self.x) @ self.M.T))

    @property
    def wrong(self) -> float:
        """The part of C that errors make: ‖A δ_t + B ε_θ^δ‖."""
        return float(torch.linalg.vector_norm(A * self.delta + B * self.error))

    def at(self, k: int, start: float, *, L: float | None = None, C: float | None = None) -> float:
        L = self.L if L is None else L
        C = self.λ * (self.moved + self.wrong) if C is None else C
        return L**k * start + C * (1 - L**k) / (1 - L)

    def measured(self, run: Run) -> list[float]:
        """‖δ^(k)‖ for k = 0, 1, … of the corrected run that sees x_t + δ_t and ε + ε_θ^δ."""
        x = self.x + self.delta
        plain = A * x + B * (x @ self.M.T + self.error)
        iterates = [run(lambda z: z @ self.M.T + self.error, x, self.λ, K)[0] for K in range(1, 9)]
        return [float(torch.linalg.vector_norm(y - self.ideal)) for y in (plain, *iterates)]


@matrices
@pytest.mark.parametrize("λ", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_bound_of_equation_20_holds(run: Run, make: Matrix, λ: float, seed: int) -> None:
    x, delta, error = (random(1, N, seed=10 * seed + i) for i in range(3))
    bound = Bound(make(SPECTRUM), λ, x, 0.1 * delta, 0.1 * error)
    measured = bound.measured(run)
    assert bound.L < 1
    for k, value in enumerate(measured):
        assert value <= bound.at(k, measured[0]) * (1 + 1e-12)


@pytest.mark.parametrize("λ", [0.1, 0.5, 1.0])
def test_the_bound_of_equation_20_is_attained(run: Run, λ: float) -> None:
    """With M = μ I, μ < 0, and all errors along x, nothing cancels: a smaller L or C would be no bound."""
    x = random(1, N, seed=6)
    bound = Bound(-0.8 * I, λ, x, 0.1 * x, -0.1 * x)
    measured = bound.measured(run)
    for k, value in enumerate(measured[1:], start=1):
        assert value == pytest.approx(bound.at(k, measured[0]), rel=1e-9)
        assert value > 1.01 * bound.at(k, measured[0], L=0.9 * bound.L)
        assert value > 1.01 * bound.at(k, measured[0], L=1 - λ if λ < 1 else 0.0)
        assert value > 1.01 * bound.at(k, measured[0], C=λ * bound.wrong)
        assert value > 1.01 * bound.at(k, measured[0], C=λ * bound.moved)


def test_errors_of_earlier_steps_are_not_forgotten(run: Run) -> None:
    """At the limit A (I - B M)^-1 δ_t is left of δ_t, much like the plain step's (A I + B M) δ_t.

    Eq. 20 does not say otherwise: its C holds ‖A δ_t‖.
    """
    M, x, delta = symmetric(SPECTRUM), random(1, N, seed=7), random(1, N, seed=8)
    one, other = (run(lambda z: z @ M.T, each, 0.5, 100, tolerance=1e-12)[0] for each in (x, x + delta))
    assert_same(other - one, fixed_point(M, delta), 1e-8)
    kept = torch.linalg.vector_norm(other - one) / torch.linalg.vector_norm(delta)
    plain = torch.linalg.vector_norm(A * delta + B * delta @ M.T) / torch.linalg.vector_norm(delta)
    assert 0.9 < kept / plain < 1.1


def fixed_point(M: Tensor, x: Tensor) -> Tensor:
    """The solution y of (I - B M) y = A x."""
    return torch.linalg.solve(I - B * M, A * x.T).T


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def assert_same(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
