"""`Plan.auto` on the digits: free, quick, and nothing where nothing helps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline

from errata import deploy
from errata.correct import EpsilonScaling, Forecast, Hindsight, Plan, Sheet, fit_sheet, wrap
from errata.correct.planner.auto import free_plans
from errata.correct.planner.candidates import cache_free_plan
from errata.correct.sampling import PlanSampler, default_inputs
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.quality.paired import psnr


@pytest.fixture(scope="module")
def artifact(digits_artifact: Callable[..., Path]) -> DeployedPipeline:
    return deploy.load(digits_artifact("deepcache-3:branch=1", steps=9))


def test_it_is_free_bound_and_better(artifact: DeployedPipeline) -> None:
    plan = Plan.auto(artifact, samples=8)
    assert plan.artifact == artifact.manifest.sha256
    assert not plan.corrects_nothing
    corrected = wrap(artifact, plan)
    corrected(batch_size=1, generator=torch.Generator().manual_seed(0), output_type="np")
    assert not corrected.stats.extra
    assert Plan.auto(artifact, samples=8) == plan


def test_nothing_is_done_without_a_cache(tiny_artifact: Callable[[str], Path]) -> None:
    assert Plan.auto(deploy.load(tiny_artifact("w8a8"))).corrects_nothing


def test_nothing_is_done_where_nothing_helps(
    artifact: DeployedPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmful = [Plan(EpsilonScaling(scale=scale)) for scale in (0.8, 1.2)]
    monkeypatch.setattr("errata.correct.planner.auto.free_plans", lambda deployed: harmful)
    assert Plan.auto(artifact, samples=4).corrects_nothing


def test_three_full_calls_in_25_steps(digits_artifact: Callable[..., Path]) -> None:
    """There Forecast with all of Hindsight makes images worse; what is chosen does not."""
    deployed = deploy.load(digits_artifact("deepcache-10", steps=25))
    chosen = Plan.auto(deployed, samples=4)
    full = Plan(Forecast()) + Plan(Hindsight())
    right, none, given, worse = (
        PlanSampler(deployed, plan, seed=70, inputs=default_inputs).sample(range(8)).images
        for plan in (cache_free_plan(), Plan.none(), chosen, full)
    )
    assert psnr(given, right).mean() >= psnr(none, right).mean()
    assert psnr(worse, right).mean() < psnr(none, right).mean()


def test_a_share_of_hindsight_is_chosen(artifact: DeployedPipeline) -> None:
    gains = {
        method.gain
        for plan in free_plans(artifact)
        for method, _ in plan.parts
        if isinstance(method, Hindsight)
    }
    assert gains == {0.25, 0.5, 1.0}


def test_a_sheet_joins_the_plan_that_it_was_fitted_under(
    digits_artifact: Callable[..., Path], digits: DDIMPipeline, tiny_artifact: Callable[[str], Path]
) -> None:
    artifact = deploy.load(digits_artifact("w4a8+deepcache-3:branch=1", steps=9))
    free = Plan.auto(artifact, samples=8)
    under = Plan(free.method, free.steps, free.also)
    sheet = fit_sheet(artifact, digits, plan=under, samples=16, held_out=16, progress=False)
    plan = Plan.auto(artifact, sheets=[sheet], samples=8)
    assert isinstance(plan.method, Sheet)
    assert [type(method) for method, _ in plan.parts[1:]] == [type(method) for method, _ in free.parts]
    with pytest.warns(UserWarning, match="5 steps"):
        shorter = artifact.at_steps(5)  # the calls of the fit's plan are others there
    methods = [method for method, _ in Plan.auto(shorter, sheets=[sheet], samples=4).parts]
    assert not any(isinstance(method, Sheet) for method in methods)
    with pytest.raises(PlanError, match="fitted to the artifact"):
        Plan.auto(deploy.load(tiny_artifact("w8a8")), sheets=[sheet])
