"""IEC against Eq. 10 of its paper, evaluated by a loop of its own in double precision."""

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

from errata.correct import IEC, Plan, wrap
from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule
from errata.runtime.unet import BranchedUNet

STEPS, TRAINED, INTERVAL = 4, 1000, 2
TOLERANCE = 1e-9  # relative to the largest value of the sample
STEP_SIZES = (0.3, 0.5, 0.7)
Reference = Callable[[int, float, int, bool, str], Tensor]


@functools.cache
def alphas_cumprod() -> list[float]:
    values, product = [], 1.0
    for i in range(TRAINED):
        product *= 1.0 - (1e-4 + (0.02 - 1e-4) * i / (TRAINED - 1))
        values.append(product)
    return values


def ddim(x: Tensor, eps: Tensor, t: int, clips: bool) -> Tensor:
    """x_{t-1}: by A_t and B_t, or through the clipped x_0."""
    alphas, stride = alphas_cumprod(), TRAINED // STEPS
    now, after = alphas[t], alphas[t - stride] if t >= stride else 1.0
    if clips:
        x0 = ((x - math.sqrt(1 - now) * eps) / math.sqrt(now)).clamp(-1, 1)
        return math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
    A = math.sqrt(after / now)
    B = math.sqrt(1 - after) - math.sqrt(after * (1 - now) / now)
    return A * x + B * eps


def sample(
    unet: BranchedUNet,
    x: Tensor,
    iterations: int,
    step_size: float,
    branch: int,
    clips: bool,
    cache_after: str,
) -> Tensor:
    """The last sample, by Eq. 10 at every full step; `iterations=0` is the plain sampler."""
    feature = None
    for i in range(STEPS):
        t = (STEPS - 1 - i) * (TRAINED // STEPS)
        if branch and i % INTERVAL:
            assert feature is not None
            x = ddim(x, unet.cached(x, t, {}, feature, branch=branch), t, clips)
            continue
        eps, feature = evaluate(unet, x, t, branch)
        y = ddim(x, eps, t, clips)
        for _ in range(iterations):
            eps_y, feature_y = evaluate(unet, y, t, branch)
            y = y + step_size * (ddim(x, eps_y, t, clips) - y)
            feature = feature_y if cache_after == "replace" else feature
        x = y
    return x


def evaluate(unet: BranchedUNet, x: Tensor, t: int, branch: int) -> tuple[Tensor, Tensor | None]:
    return unet.full(x, t, {}, branch=branch) if branch else (unet.unet(x, t).sample, None)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def unet(tiny_pipeline: DDIMPipeline) -> BranchedUNet:
    return BranchedUNet(copy.deepcopy(tiny_pipeline.unet).double())


@pytest.fixture(scope="module")
def reference(unet: BranchedUNet, noise: Tensor) -> Reference:
    """`sample` of the remaining arguments; each is computed once."""
    return torch.no_grad()(functools.cache(functools.partial(sample, unet, noise)))


@pytest.fixture
def deployed(deploy_unet: Callable[..., DeployedPipeline], branch: int, clips: bool) -> DeployedPipeline:
    scheduler = DDIMScheduler(num_train_timesteps=TRAINED, clip_sample=clips)
    scheduler.alphas_cumprod = torch.tensor(alphas_cumprod(), dtype=torch.float64)
    schedule = CacheSchedule.uniform(STEPS, interval=INTERVAL, branch=branch) if branch else None
    return deploy_unet(scheduler, STEPS, schedule=schedule)


@pytest.mark.parametrize("clips", [False, True], ids=["linear", "clipped"])
@pytest.mark.parametrize(
    ("branch", "cache_after"), [(0, "replace"), (1, "replace"), (1, "keep"), (3, "replace"), (3, "keep")]
)
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_equals_equation_10(
    deployed: DeployedPipeline,
    reference: Reference,
    noise: Tensor,
    iterations: int,
    branch: int,
    clips: bool,
    cache_after: str,
) -> None:
    plain = reference(0, 0.0, branch, clips, "replace")
    assert_same(deployed(latents=noise), plain)
    for step_size in STEP_SIZES:
        method = IEC(
            step_size=step_size,
            iterations=iterations,
            guard=False,  # a network with random weights need not contract
            tolerance=0.0,
            cache_after="replace" if cache_after == "replace" else "keep",
        )
        corrected = wrap(deployed, Plan(method, steps="full"))
        expected = reference(iterations, step_size, branch, clips, cache_after)
        assert_same(corrected(latents=noise), expected)
        assert corrected.stats.extra == {"full": float(iterations * (STEPS // INTERVAL if branch else STEPS))}


@pytest.mark.parametrize("clips", [False, True], ids=["linear", "clipped"])
@pytest.mark.parametrize("branch", [0, 1, 3])
def test_the_comparison_could_fail(reference: Reference, branch: int, clips: bool) -> None:
    """No correction, another λ, another K, the other cache rule: all far outside the tolerance."""
    variants = [reference(0, 0.0, branch, clips, "replace")]
    for cache_after in ("replace", "keep") if branch else ("replace",):
        for iterations in (1, 2, 3):
            variants += [reference(iterations, λ, branch, clips, cache_after) for λ in STEP_SIZES]
    for index, one in enumerate(variants):
        for other in variants[:index]:
            assert (one - other).abs().max() > 1e4 * TOLERANCE * one.abs().max()


def test_the_network_is_not_trivial(unet: BranchedUNet, noise: Tensor) -> None:
    with torch.no_grad():
        size = unet.unet(noise, 500).sample.square().mean().sqrt()
    assert 0.5 < size < 2.0


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
