"""One denoiser, written as a network of ε, of v and of x_0: IEC makes the same of each."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Generator, Tensor

from errata.correct import IEC, Plan, wrap
from errata.correct.corrector import CorrectorContext
from errata.correct.methods import iec
from errata.correct.noise_levels import NoiseLevels
from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule

Deploy = Callable[..., DeployedPipeline]

STEPS = 10
TOLERANCE = 1e-6  # of the largest value of the sample
KINDS = ("epsilon", "v_prediction", "sample")
# torch and diffusers 0.42 mix tensors and arrays in ways that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
LEAVING = IEC(iterations=4, tolerance=0.02, guard=False)  # the two samples at different times
METHODS = {
    "paper": IEC(),
    "three": IEC(step_size=0.3, iterations=3, tolerance=0.0, guard=False),
    "leaving": LEAVING,
    "official": IEC.official("latent"),
}


@dataclass(frozen=True)
class Denoiser:
    """Of data whose values are bimodal: x_0 = tanh(2 a x / b²) of z = a x_0 + b ε; a² + b² = 1."""

    kind: str
    levels: list[tuple[float, float]]

    def __call__(self, z: Tensor, step: int) -> Tensor:
        a, b = self.levels[step]
        x_0 = torch.tanh(z * 2 * a / b**2)
        eps = (z - a * x_0) / b
        return {"epsilon": eps, "v_prediction": a * eps - b * x_0, "sample": x_0}[self.kind]


def made(scheduler: type[Any], kind: str) -> tuple[Any, Denoiser]:
    """The scheduler and its network. DDIM computes in its table's type, float64 here; Euler in float32."""
    betas = {"beta_start": 1e-4, "beta_end": 0.008}
    if scheduler is EulerDiscreteScheduler:
        built = scheduler(prediction_type=kind, **betas)
        built.set_timesteps(STEPS)
        alphas = [1 / (1 + float(sigma) ** 2) for sigma in built.sigmas[:-1]]
    else:
        built = scheduler(prediction_type=kind, clip_sample=False, **betas)
        built.alphas_cumprod = built.alphas_cumprod.double()
        built.set_timesteps(STEPS)
        alphas = [float(built.alphas_cumprod[t]) for t in built.timesteps]
    return built, Denoiser(kind, [(alpha**0.5, (1 - alpha) ** 0.5) for alpha in alphas])


def noise() -> Tensor:
    return torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=Generator().manual_seed(1))


def sampled(deploy: Deploy, scheduler: type[Any], kind: str, method: IEC | None) -> Tensor:
    built, network = made(scheduler, kind)
    deployed = deploy(network, built, STEPS)
    x = noise()
    result: Tensor = deployed(latents=x) if method is None else wrap(deployed, Plan(method))(latents=x)
    return result


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("name", METHODS)
def test_the_parameterization_does_not_matter(
    deploy_closed_form: Deploy, scheduler: type[Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS[name]
    expected = sampled(deploy_closed_form, scheduler, "epsilon", method)
    plain = sampled(deploy_closed_form, scheduler, "epsilon", None)
    assert distance(plain, expected) > 1e-3
    for kind in KINDS[1:]:
        assert distance(sampled(deploy_closed_form, scheduler, kind, None), plain) < TOLERANCE
        assert distance(sampled(deploy_closed_form, scheduler, kind, method), expected) < TOLERANCE
    # Read as if it had been made at x_t, a prediction of v or x_0 leads elsewhere.
    monkeypatch.setattr(iec, "_meant_at_start", lambda view, levels: view.evaluate)
    for kind in KINDS[1:]:
        assert distance(sampled(deploy_closed_form, scheduler, kind, method), expected) > 1e3 * TOLERANCE


def test_the_samples_leave_at_different_times(deploy_closed_form: Deploy) -> None:
    """So that "leaving" evaluates one without its neighbour; and they leave so whatever the kind."""
    iterations = []
    for kind in KINDS:
        built, network = made(DDIMScheduler, kind)
        corrected = wrap(deploy_closed_form(network, built, STEPS), Plan(LEAVING))
        corrected(latents=noise())
        iterations.append([each.iterations for each in corrected.stats.steps])
    assert any(one < other for one, other in iterations[0])
    assert any(one > other for one, other in iterations[0])
    assert iterations[1:] == iterations[:1] * 2


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("reason", ["pure noise", "unknown levels"])
def test_what_cannot_be_read_as_noise_is_blended_as_it_is(kind: str, reason: str) -> None:
    """Pure noise, or levels that nobody knows: the prediction at the iterate goes into the blend itself."""
    levels = (
        NoiseLevels(signal=(0.0,), noise=(1.0,), prediction_type=kind) if reason == "pure noise" else None
    )
    x = noise()
    view: Any = SimpleNamespace(
        step=0,
        sample=x,
        prediction=torch.cos(x),
        is_linear=True,
        preview=lambda prediction: 0.9 * x - 0.2 * prediction,
        evaluate=lambda samples, rows=None, *, step=None: (torch.cos(samples), ()),
    )
    setting = CorrectorContext(
        steps=(0,), schedule=CacheSchedule.uncached(1), timesteps=(999.0,), levels=levels
    )
    correction = IEC().corrector(setting).at_step(view)
    assert correction is not None
    expected = 0.5 * torch.cos(x) + 0.5 * torch.cos(0.9 * x - 0.2 * torch.cos(x))
    torch.testing.assert_close(correction.prediction, expected, rtol=1e-12, atol=1e-12)
