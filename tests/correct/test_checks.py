"""What a corrected run refuses, or must not disturb, whatever its plan is."""

import threading
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Generator, Tensor

from errata.correct import (
    IEC,
    DiffIER,
    EpsilonScaling,
    Forecast,
    Hindsight,
    Langevin,
    Lookahead,
    Plan,
    Refresh,
    SecondOrder,
    wrap,
)
from errata.deploy import DeployedPipeline
from errata.errors import ErrataError, PlanError
from errata.runtime.schedule import CacheSchedule

Deploy = Callable[..., DeployedPipeline]
STEPS = 6


def network(x: Tensor, step: int) -> Tensor:
    return torch.sin(2 * x + step)


def latents(batch_size: int) -> Tensor:
    return torch.randn(batch_size, 1, 4, 4, generator=Generator().manual_seed(5))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Forecast()),
        Plan(Refresh(), "3"),
        Plan(Lookahead()),
        Plan(Hindsight()),
        Plan(IEC(), "2"),
        Plan(EpsilonScaling(), "0"),
    ],
)
def test_nan_is_told_whatever_the_plan_does_there(
    deploy_closed_form: Deploy, ddim: DDIMScheduler, plan: Plan
) -> None:
    def broken(x: Tensor, step: int) -> Tensor:
        return network(x, step) + (float("inf") if step == 4 else 0.0)

    schedule = CacheSchedule.uniform(STEPS, interval=2, branch=1)
    corrected = wrap(deploy_closed_form(broken, ddim, STEPS, schedule=schedule), plan)
    with pytest.raises(
        ErrataError, match="step 4: the denoiser returned NaN or infinite values for sample 0"
    ):
        corrected(latents=latents(2))


@pytest.mark.parametrize("between", [Plan.none(), Plan(Hindsight(), "4")])
def test_two_methods_that_set_the_sample_do_not_share_a_step(
    deploy_closed_form: Deploy, ddim: DDIMScheduler, between: Plan
) -> None:
    schedule = CacheSchedule.uniform(STEPS, interval=2, branch=1)
    deployed = deploy_closed_form(network, ddim, STEPS, schedule=schedule)
    plan = Plan(Langevin(), "4") + between + Plan(SecondOrder(), "4")
    with pytest.raises(PlanError, match="step 4: two methods correct the sample here.*different steps"):
        wrap(deployed, plan)
    wrap(deployed, Plan(Langevin(), "4") + between + Plan(SecondOrder(), "2"))(latents=latents(2))


def test_a_pipeline_that_never_guides_is_refused_before_it_samples(
    deploy_closed_form: Deploy, ddim: DDIMScheduler
) -> None:
    deployed = deploy_closed_form(network, ddim, STEPS)
    with pytest.raises(PlanError, match="LoopPipeline has no guidance scale; correct with IEC"):
        wrap(deployed, Plan(DiffIER()))


def test_iec_sets_the_sample_where_the_scheduler_is_not_linear(deploy_closed_form: Deploy) -> None:
    plan = Plan(EpsilonScaling(scale=1.01)) + Plan(IEC()) + Plan(EpsilonScaling(scale=1.01), "2")
    clipping, plain = (DDIMScheduler(clip_sample=clips, set_alpha_to_one=False) for clips in (True, False))
    wrap(deploy_closed_form(network, plain, STEPS), plan)(latents=latents(2))
    with pytest.raises(PlanError, match="step 2: two methods correct the sample here"):
        wrap(deploy_closed_form(network, clipping, STEPS), plan)


def test_what_only_the_call_bends_is_refused_at_its_step(deploy_closed_form: Deploy) -> None:
    """The tap's own refusal, where `wrap` could not know: here the scheduler's class is taken for linear."""
    clipping = DDIMScheduler(clip_sample=True, set_alpha_to_one=False)
    plan = Plan(IEC(), "2") + Plan(EpsilonScaling(scale=1.01), "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("errata.correct.pipeline.is_linear", lambda scheduler: True)
        corrected = wrap(deploy_closed_form(network, clipping, STEPS), plan)
    with pytest.raises(PlanError, match="step 2: two methods correct the sample here"):
        corrected(latents=latents(2))


def test_a_batch_decision_is_no_part_of_batch_invariance(
    deploy_closed_form: Deploy, ddim: DDIMScheduler
) -> None:
    deployed = deploy_closed_form(network, ddim, STEPS)
    plan = Plan(IEC.official())
    with pytest.raises(PlanError, match="stopping='official'.*depends on the others in it.*per_sample"):
        wrap(deployed, plan, batch_invariant=True)
    wrap(deployed, plan)


def test_a_preview_takes_no_noise_from_other_threads(deploy_closed_form: Deploy) -> None:
    """Another thread draws from torch's own generator, while a correction previews steps that draw, too."""
    corrected = wrap(
        deploy_closed_form(network, DDPMScheduler(clip_sample=False), 40),
        Plan(IEC(iterations=4, guard=False)),
    )
    drawn: list[float] = []
    stop = threading.Event()

    def draw() -> None:
        while not stop.is_set():
            drawn.append(float(torch.randn(1, dtype=torch.float64)))

    other = threading.Thread(target=draw)
    with torch.random.fork_rng(devices=[]):
        other.start()
        try:
            for _ in range(3):
                corrected(latents=latents(2))
        finally:
            stop.set()
            other.join()
    assert len(drawn) > 100
    assert len(set(drawn)) == len(drawn)
