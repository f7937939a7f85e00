"""IEC against Eq. 10 for every sampler whose step is linear in the prediction: K = 1-5, λ = 0.1-1.

The reference is a loop of its own in float64. For DDIM its coefficients are its own too; for the others a
step is that of a fresh scheduler, taken on a deep copy. It returns the iterate of Eq. 10, never the step that
the blended prediction leads to: that prediction enters the history, and nothing else. What the network
predicts at the iterate, v or x_0 as well, is read as ε there, by a closed form of its own.
"""

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Generator, Tensor

from errata.correct import IEC, Plan, RunStats, wrap
from errata.deploy import DeployedPipeline

# torch and diffusers 0.42 mix tensors and arrays in ways that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

Deploy = Callable[..., DeployedPipeline]
Network = Callable[[Tensor, int], Tensor]

STEPS, TRAINED = 5, 1000
# So little noise that five steps contract at λ = 1 too: no sample is stopped, no guard steps in.
BETA_START, BETA_END = 1e-4, 0.004
SIZE = 4  # of an image; 16 values
# Relative to the largest value of the sample. Measured are 2e-15, but diffusers' Euler and stochastic
# DPM-Solver++ round x_t to float32, so that a last bit may become a difference of 6e-8.
TOLERANCE = 1e-6
PAIRS = [(1, 0.5), (1, 1.0), (2, 0.1), (3, 1.0), (4, 0.1), (5, 0.1), (5, 1.0)]
KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
MEMORYLESS = (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
SCALED = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler)


@dataclass(frozen=True)
class Sampler:
    """A scheduler, its options, and η."""

    scheduler: Any
    options: dict[str, Any]
    eta: float = 0.0

    def fresh(self) -> Any:
        return self.scheduler(beta_start=BETA_START, beta_end=BETA_END, **self.options)

    @property
    def kind(self) -> str:
        return str(self.options.get("prediction_type", "epsilon"))

    @property
    def arguments(self) -> dict[str, float]:
        return {"eta": self.eta} if self.eta else {}


def _linear() -> Iterator[tuple[str, Sampler]]:
    for short, kind in KINDS.items():
        as_kind = {"prediction_type": kind}
        for eta in (0.0, 0.5):
            yield f"ddim-{short}-eta{eta}", Sampler(DDIMScheduler, {"clip_sample": False, **as_kind}, eta)
        yield f"ddpm-{short}", Sampler(DDPMScheduler, {"clip_sample": False, **as_kind})
        yield f"euler-{short}", Sampler(EulerDiscreteScheduler, as_kind)
        yield f"deis-{short}", Sampler(DEISMultistepScheduler, as_kind)
        yield f"unipc-{short}", Sampler(UniPCMultistepScheduler, as_kind)
        for order in (1, 2, 3):
            options = {"solver_order": order, **as_kind}
            yield f"dpm++{order}m-{short}", Sampler(DPMSolverMultistepScheduler, options)
            options = {**options, "lower_order_final": True}
            yield f"dpm++{order}s-{short}", Sampler(DPMSolverSinglestepScheduler, options)
        if kind != "sample":  # diffusers 0.42 has no such rule for these
            yield f"euler-a-{short}", Sampler(EulerAncestralDiscreteScheduler, as_kind)
            yield f"heun-{short}", Sampler(HeunDiscreteScheduler, as_kind)
            # Without the option, or the offset, the last step is the identity.
            yield f"pndm-{short}", Sampler(PNDMScheduler, {"set_alpha_to_one": True, **as_kind})
            options = {"skip_prk_steps": True, "steps_offset": 1, **as_kind}
            yield f"plms-{short}", Sampler(PNDMScheduler, options)
    yield "dpm-sde", Sampler(DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"})


LINEAR = dict(_linear())
CLIP = {"clip_sample": True, "clip_sample_range": 0.3}
CLIPPED = ("ddim-eps-eta0.0", "ddim-v-eta0.0", "ddim-x0-eta0.0", "ddim-eps-eta0.5", "ddpm-eps", "heun-eps")
THRESHOLD = {"thresholding": True, "sample_max_value": 2.0}
THRESHOLDED = ("ddim-eps-eta0.0", "ddpm-v", "deis-eps", "dpm++2m-eps", "dpm++2s-eps", "unipc-eps")
BENT = {
    f"{name} {bend}": replace(LINEAR[name], options=LINEAR[name].options | options)
    for bend, names, options in (("clipped", CLIPPED, CLIP), ("thresholded", THRESHOLDED, THRESHOLD))
    for name in names
}
UNET = {name: LINEAR[name] for name in ("ddim-eps-eta0.5", "plms-eps", "dpm++2m-v")}
# λ is 10 % larger; one iteration more, or fewer; evaluated at x_t, or at the next timestep; the plain
# prediction enters the history; other noise in every preview; the iterate is not scaled for the network; its
# v or x_0 is read as if it had been predicted at x_t.
FAULTS = ("λ", "more", "fewer", "at x_t", "next t", "history", "noise", "input", "raw")


@functools.cache
def matrix() -> Tensor:
    """Symmetric, eigenvalues 0.2 to 0.6."""
    n = SIZE * SIZE
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=Generator().manual_seed(2)))[0]
    return basis @ torch.diag(torch.linspace(0.2, 0.6, n, dtype=torch.float64)) @ basis.T


def closed_form(x: Tensor, step: int) -> Tensor:
    """M x + 0.3 sin(x + i), whose Jacobian M + 0.3 diag(cos(x + i)) has eigenvalues in [-0.1, 0.9]."""
    return (x.flatten(1) @ matrix()).view_as(x) + 0.3 * torch.sin(x + step)


def clean_form(x: Tensor, step: int) -> Tensor:
    """Half of x stays, as of a clean sample; read as x_0, `closed_form` would not contract at λ = 1."""
    return x - 0.5 * closed_form(x, step)


def form(kind: str) -> Network:
    return clean_form if kind == "sample" else closed_form


def latents(size: int = SIZE) -> Tensor:
    return torch.randn(2, 1, size, size, dtype=torch.float64, generator=Generator().manual_seed(3))


def noise() -> Generator:
    return Generator().manual_seed(11)


def copied(scheduler: Any) -> Any:
    """A deep copy, but for what no step changes: the settings, and the tables of all trained timesteps."""
    held = vars(scheduler).values()
    tables = [value for value in held if isinstance(value, Tensor) and value.shape == (TRAINED,)]
    return copy.deepcopy(scheduler, {id(value): value for value in (scheduler.config, *tables)})


def step(sampler: Sampler, scheduler: Any, eps: Tensor, t: Tensor, x: Tensor, draws: Generator) -> Tensor:
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": draws} if takes_generator else {}
    result: Tensor = scheduler.step(eps, t, x, **sampler.arguments, **extra)[0]
    return result


def epsilon(kind: str, z: Tensor, p: Tensor, α: float, s: float) -> Tensor:
    """ε of z = α x_0 + s ε, α² + s² = 1, of which the network says p."""
    return {"epsilon": p, "v_prediction": α * p + s * z, "sample": (z - α * p) / s}[kind]


def said(kind: str, z: Tensor, eps: Tensor, α: float, s: float) -> Tensor:
    """What a network would have to say of z for `eps` to be meant; inverse of `epsilon`."""
    return {"epsilon": eps, "v_prediction": (eps - s * z) / α, "sample": (z - s * eps) / α}[kind]


def level(sampler: Sampler, scheduler: Any, i: int) -> tuple[float, float]:
    """α and s of the network's input at call i."""
    if sampler.scheduler in SCALED:  # timesteps between whole numbers
        size = math.hypot(1, float(scheduler.sigmas[i]))
        return 1 / size, float(scheduler.sigmas[i]) / size
    now = alpha_bar(int(scheduler.timesteps[i]))
    return math.sqrt(now), math.sqrt(1 - now)


def by_equation_10(
    sampler: Sampler, network: Network, x: Tensor, K: int, λ: float, *, fault: str = ""
) -> Tensor:
    """The last sample; `K=0` is the plain sampler."""
    K += {"more": 1, "fewer": -1}.get(fault, 0)
    λ *= 1.1 if fault == "λ" else 1.0
    scheduler, draws = sampler.fresh(), noise()
    scheduler.set_timesteps(STEPS)
    x = x * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):

        def preview(eps: Tensor, t: Tensor = t, x: Tensor = x) -> Tensor:
            ahead = draws if fault == "noise" else draws.clone_state()
            return step(sampler, copied(scheduler), eps, t, x, ahead)

        at = min(i + 1, len(scheduler.timesteps) - 1) if fault == "next t" else i
        plain = eps = network(scheduler.scale_model_input(x, t), i)
        y = preview(eps)
        for _ in range(K):
            z = x if fault == "at x_t" else y
            scaled = scheduler.scale_model_input(z, t)
            eps_y = network(z if fault == "input" else scaled, at)
            if fault != "raw":
                levels = level(sampler, scheduler, i)
                meant = epsilon(sampler.kind, scaled, eps_y, *levels)
                eps_y = said(sampler.kind, scheduler.scale_model_input(x, t), meant, *levels)
            y = y + λ * (preview(eps_y) - y)
            eps = eps + λ * (eps_y - eps)
        step(sampler, scheduler, plain if fault == "history" else eps, t, x, draws)
        x = y
    return x


@dataclass(frozen=True)
class ByHand:
    """DDIM in float64, no table and no line of diffusers; see `test_ddim_against_coefficients_of_its_own`."""

    kind: str
    eta: float = 0.0
    clips: bool = False

    reads_at_x_t: bool = False  # which is wrong

    def step(self, x: Tensor, eps: Tensor, t: int, z: Tensor) -> Tensor:
        now, after = alpha_bar(t), alpha_bar(t - TRAINED // STEPS)
        x0 = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
        if self.clips:
            x0 = x0.clamp(-1, 1)
        drawn = self.eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        return math.sqrt(after) * x0 + math.sqrt(1 - after - drawn**2) * eps + drawn * z

    def sample(self, x: Tensor, K: int, λ: float) -> Tensor:
        """By Eq. 10; every prediction is turned into ε, and none back."""
        draws = noise()
        for i in range(STEPS):
            t = (STEPS - 1 - i) * (TRAINED // STEPS)
            levels = math.sqrt(alpha_bar(t)), math.sqrt(1 - alpha_bar(t))
            z = torch.randn(x.shape, dtype=x.dtype, generator=draws) if self.eta else torch.zeros_like(x)
            y = self.step(x, epsilon(self.kind, x, form(self.kind)(x, i), *levels), t, z)
            for _ in range(K):
                eps_y = epsilon(self.kind, x if self.reads_at_x_t else y, form(self.kind)(y, i), *levels)
                y = y + λ * (self.step(x, eps_y, t, z) - y)
            x = y
        return x


@functools.cache
def alpha_bar(t: int) -> float:
    """Cumulative product of 1 - β; 1 at the clean sample."""
    return math.prod(1 - (BETA_START + (BETA_END - BETA_START) * s / (TRAINED - 1)) for s in range(t + 1))


@pytest.fixture
def deployed(deploy_closed_form: Deploy, name: str) -> DeployedPipeline:
    sampler = (LINEAR | BENT)[name]
    return deploy_closed_form(form(sampler.kind), sampler.fresh(), STEPS)


@pytest.mark.parametrize("name", [*LINEAR, *BENT])
def test_equals_equation_10(deployed: DeployedPipeline, name: str) -> None:
    sampler = (LINEAR | BENT)[name]
    for K, λ in PAIRS:
        actual, stats = corrected(deployed, sampler, latents(), K, λ)
        assert_same(actual, by_equation_10(sampler, form(sampler.kind), latents(), K, λ))
        assert_contracts(stats, K)


@pytest.mark.parametrize("name", UNET)
def test_equals_equation_10_with_a_unet(deploy_unet: Deploy, tiny_pipeline: DDIMPipeline, name: str) -> None:
    sampler, network = UNET[name], by_timestep(tiny_pipeline, UNET[name])
    deployed = deploy_unet(sampler.fresh(), STEPS)
    for K, λ in ((2, 1.0), (5, 0.1)):
        actual, stats = corrected(deployed, sampler, latents(8), K, λ)
        assert_same(actual, by_equation_10(sampler, network, latents(8), K, λ))
        assert_contracts(stats, K)
    assert_faults_show(sampler, network, latents(8), 2, 1.0)


@pytest.mark.parametrize("name", [*LINEAR, *BENT])
def test_the_comparison_could_fail(name: str) -> None:
    """Each wrong variant is more than 100 tolerances away."""
    sampler = (LINEAR | BENT)[name]
    assert_faults_show(sampler, form(sampler.kind), latents(), 2, 0.5)


@pytest.mark.parametrize("name", BENT)
def test_the_bent_samplers_bend(name: str) -> None:
    """Clipping and thresholding do something here, so an exact preview differs from a blend."""
    bent, straight = (
        by_equation_10(sampler, form(sampler.kind), latents(), 2, 0.5)
        for sampler in (BENT[name], LINEAR[name.split()[0]])
    )
    assert distance(straight, bent) > 1e-2


@pytest.mark.parametrize("clips", [False, True], ids=["linear", "clipped"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS.values())
def test_ddim_against_coefficients_of_its_own(
    deploy_closed_form: Deploy, kind: str, eta: float, clips: bool
) -> None:
    """With the scheduler's one table in float64: in float32 it is 1.3e-6 off by itself."""
    sampler = Sampler(DDIMScheduler, {"clip_sample": clips, "prediction_type": kind}, eta)
    scheduler = sampler.fresh()
    scheduler.alphas_cumprod = torch.tensor([alpha_bar(t) for t in range(TRAINED)], dtype=torch.float64)
    deployed = deploy_closed_form(form(kind), scheduler, STEPS)
    reference = ByHand(kind, eta, clips)
    for K, λ in PAIRS:
        expected = reference.sample(latents(), K, λ)
        assert_same(corrected(deployed, sampler, latents(), K, λ)[0], expected)
        wrongs = [reference.sample(latents(), K, 1.1 * λ), reference.sample(latents(), K - 1, λ)]
        if kind != "epsilon":
            wrongs.append(replace(reference, reads_at_x_t=True).sample(latents(), K, λ))
        for wrong in wrongs:
            assert distance(wrong, expected) > 10 * TOLERANCE


def corrected(
    deployed: DeployedPipeline, sampler: Sampler, x: Tensor, K: int, λ: float
) -> tuple[Tensor, RunStats]:
    pipeline = wrap(deployed, Plan(IEC(step_size=λ, iterations=K, tolerance=0.0)))
    return pipeline(latents=x, generator=noise(), **sampler.arguments), pipeline.stats


def by_timestep(pipeline: DDIMPipeline, sampler: Sampler) -> Network:
    unet, scheduler = copy.deepcopy(pipeline.unet).double(), sampler.fresh()
    scheduler.set_timesteps(STEPS)
    return torch.no_grad()(lambda x, step: unet(x, scheduler.timesteps[step]).sample)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def assert_contracts(stats: RunStats, K: int) -> None:
    """Every sample took every iteration, and each moved it less than the one before."""
    for each in stats.steps:
        assert each.iterations == (K, K)
        for residuals in each.residuals:
            assert all(after < before for before, after in itertools.pairwise(residuals))


def assert_faults_show(sampler: Sampler, network: Network, x: Tensor, K: int, λ: float) -> None:
    expected = by_equation_10(sampler, network, x, K, λ)
    for fault in faults(sampler):
        wrong = by_equation_10(sampler, network, x, K, λ, fault=fault)
        assert distance(wrong, expected) > 100 * TOLERANCE, fault


def faults(sampler: Sampler) -> set[str]:
    """Those that change anything under this sampler."""
    is_sde = "algorithm_type" in sampler.options
    draws = sampler.eta > 0 or is_sde or sampler.scheduler in (DDPMScheduler, EulerAncestralDiscreteScheduler)
    without = {
        "history": sampler.scheduler in MEMORYLESS or sampler.options.get("solver_order") == 1,
        "noise": not draws,
        "input": sampler.scheduler not in SCALED,
        "raw": sampler.kind == "epsilon",
    }
    return {fault for fault in FAULTS if not without.get(fault, False)}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())
