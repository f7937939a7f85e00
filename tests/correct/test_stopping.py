"""Every sample stops by itself, and one that has stopped costs nothing."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from errata.correct import IEC, CorrectedPipeline, Plan, wrap
from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule

Deploy = Callable[..., DeployedPipeline]
STEPS = 4


def sensitive_where_positive(x: Tensor, step: int) -> Tensor:
    """Channel 0 depends on itself where channel 1 is positive; elsewhere nothing depends on x.

    Channel 1 is never predicted to be noise, so it keeps its sign from step to step.
    """
    eps = torch.zeros_like(x)
    eps[:, 0] = torch.tanh(3 * x[:, 0]) * (x[:, 1].clamp(min=0) * 4).tanh()
    return eps


@pytest.fixture(params=[None, 2], ids=["uncached", "cached"])
def corrected(
    request: pytest.FixtureRequest, deploy_closed_form: Deploy, ddim: DDIMScheduler
) -> CorrectedPipeline:
    schedule = request.param and CacheSchedule.uniform(STEPS, interval=request.param, branch=1)
    deployed = deploy_closed_form(sensitive_where_positive, ddim, STEPS, schedule=schedule)
    return wrap(deployed, Plan(IEC(iterations=4, tolerance=1e-3), "full"))


def noise(*signs: float) -> Tensor:
    """One sample per entry; those with a positive one are sensitive, the more the larger it is."""
    x = torch.randn(len(signs), 2, 4, 4, generator=torch.Generator().manual_seed(1))
    x[:, 1] = torch.tensor(signs)[:, None, None]
    return x


def test_a_converged_sample_leaves_the_batch(corrected: CorrectedPipeline) -> None:
    corrected(latents=noise(-1.0, 1.0))
    denoiser = corrected.deployed.denoiser
    first = corrected.stats.steps[0]
    assert first.iterations == (1, 4)
    assert first.extra == {"full": (1 + 4) / 2}
    assert denoiser.calls[:5] == [("full", 2), ("full", 2), ("full", 1), ("full", 1), ("full", 1)]  # type: ignore[attr-defined]
    assert first.residuals[0] == (0.0,)
    assert len(first.residuals[1]) == 4
    assert all(residual > 1e-3 for residual in first.residuals[1])


def test_when_all_have_converged_the_step_is_over(corrected: CorrectedPipeline) -> None:
    corrected(latents=noise(-1.0, -0.5, -2.0))
    assert all(each.iterations in ((), (1, 1, 1)) for each in corrected.stats.steps)
    assert corrected.stats.extra == {"full": float(len(corrected.steps))}


def test_an_image_does_not_depend_on_its_neighbours(corrected: CorrectedPipeline) -> None:
    """Samples, decisions and residuals are bit for bit those of each sample alone."""
    batch = noise(1.0, -1.0, 3e-5, 1e-4, 3e-4)
    together = corrected(latents=batch)
    stats = corrected.stats
    assert len(set(stats.iterations)) >= 4, stats.iterations  # they do stop at different times
    for index in range(5):
        alone = corrected(latents=batch[index : index + 1])
        assert torch.equal(alone[0], together[index])
        for one, many in zip(corrected.stats.steps, stats.steps, strict=True):
            assert one.iterations == many.iterations[index : index + 1]
            assert one.residuals == many.residuals[index : index + 1]


def test_tolerance_zero_never_stops_a_moving_sample(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> None:
    corrected = wrap(
        deploy_closed_form(lambda x, step: torch.tanh(x), ddim, STEPS),
        Plan(IEC(iterations=3, tolerance=0.0)),
    )
    corrected(latents=noise(1.0, 1.0))
    assert corrected.stats.iterations == (3 * STEPS, 3 * STEPS)
