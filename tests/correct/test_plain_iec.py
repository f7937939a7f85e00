"""The careful corrector against `plain_iec`, which is Eq. 10 as the paper has it."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from errata.correct import IEC, Plan, wrap
from errata.correct.methods.iec import plain_iec
from errata.deploy import DeployedPipeline

STEPS = 4
TOLERANCE = 1e-6  # relative to the largest value of the sample
Reference = Callable[[float, int], Tensor]


@pytest.fixture
def noise() -> Tensor:
    return torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def deployed(deploy_unet: Callable[..., DeployedPipeline], clips: bool) -> DeployedPipeline:
    return deploy_unet(DDIMScheduler(clip_sample=clips), STEPS)


def plain_run(deployed: DeployedPipeline, x: Tensor, step_size: float, iterations: int) -> Tensor:
    """x_0 from `x` = x_T, `plain_iec` at every step."""
    scheduler = copy.deepcopy(deployed.pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    for i, t in enumerate(scheduler.timesteps):

        def denoise(x: Tensor, i: int = i) -> Tensor:
            return deployed.denoiser.full(x, i, {})[0]

        def step(x_t: Tensor, eps: Tensor, t: Tensor = t) -> Tensor:
            prev_sample: Tensor = scheduler.step(eps, t, x_t).prev_sample
            return prev_sample

        x = plain_iec(x, denoise(x), step, denoise, step_size=step_size, iterations=iterations)
    return x


@pytest.mark.parametrize("clips", [False, True], ids=["linear", "clipped"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("step_size", [0.3, 0.5])
def test_the_corrector_is_the_plain_loop(
    deployed: DeployedPipeline, noise: Tensor, step_size: float, iterations: int
) -> None:
    method = IEC(step_size=step_size, iterations=iterations, tolerance=0.0, guard=False)
    corrected = wrap(deployed, Plan(method, steps="all"))(latents=noise)
    plain = functools.partial(plain_run, deployed, noise)
    assert distance(plain(step_size, iterations), corrected) < TOLERANCE
    for wrong in (plain(step_size, iterations - 1), plain(step_size, iterations + 1), plain(0.6, iterations)):
        assert distance(wrong, corrected) > 1000 * TOLERANCE


@pytest.mark.parametrize("clips", [False, True], ids=["linear", "clipped"])
def test_without_iterations_it_is_the_plain_step(deployed: DeployedPipeline, noise: Tensor) -> None:
    assert torch.equal(plain_run(deployed, noise, 0.5, 0), deployed(latents=noise))


@pytest.mark.parametrize("clips", [True])
def test_the_clipped_step_is_not_linear(deployed: DeployedPipeline, noise: Tensor) -> None:
    """So the two cases above differ: here a blend of predictions does not lead to the blend of samples."""
    scheduler = copy.deepcopy(deployed.pipe.scheduler)
    scheduler.set_timesteps(STEPS)

    def step(eps: Tensor) -> Tensor:
        prev_sample: Tensor = scheduler.step(eps, scheduler.timesteps[0], noise).prev_sample
        return prev_sample

    assert distance(step(0 * noise) + step(2 * noise), 2 * step(noise)) > 1000 * TOLERANCE


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())
