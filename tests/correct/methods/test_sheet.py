"""A sheet on an artifact: what it acts on, and where it is refused or warns."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sheets import MappedByHand, made_up_sheet
from torch import Tensor

from errata import correct, deploy
from errata.correct import IEC, Forecast, Hindsight, Plan, Sheet
from errata.deploy import DeployedPipeline
from errata.errors import PlanError


@pytest.fixture(scope="module")
def cached(tiny_artifact: Callable[[str], Path]) -> DeployedPipeline:
    return deploy.load(tiny_artifact("deepcache-3"))


def sample(deployed: DeployedPipeline, plan: Plan) -> Tensor:
    output = correct.wrap(deployed, plan)(
        batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    return torch.from_numpy(output.images)


PLANS = {
    "alone": Plan.none(),
    "forecast": Plan(Forecast()),
    "hindsight": Plan(Forecast()) + Plan(Hindsight()),
    "iec": Plan(IEC(), steps="full"),
}


@pytest.mark.parametrize("name", PLANS)
def test_it_corrects_every_evaluation_and_so_is_a_better_network(name: str, cached: DeployedPipeline) -> None:
    """It is the plan on an artifact whose network has the map, what IEC evaluates included."""
    plan = PLANS[name]
    sheet = made_up_sheet(cached, plan)
    better = cached.clone()
    better.pipe.unet.denoiser = MappedByHand(better.denoiser)
    expected, plain = sample(better, plan), sample(cached, plan)
    found = sample(cached, Plan(sheet) + plan)
    assert torch.allclose(found, expected, atol=1e-5)
    assert float((plain - expected).abs().max()) > 1e-3
    assert torch.equal(sample(cached, plan + Plan(sheet)), found)  # its place in the plan has no meaning


def test_only_the_chosen_steps_are_corrected(cached: DeployedPipeline) -> None:
    sheet = made_up_sheet(cached)
    some = sample(cached, Plan(sheet, steps="first:2"))
    assert not torch.equal(some, sample(cached, Plan(sheet)))
    assert not torch.equal(some, sample(cached, Plan.none()))


def test_it_takes_no_evaluation_and_no_look_at_the_steps(cached: DeployedPipeline) -> None:
    corrected = correct.wrap(cached, Plan(made_up_sheet(cached)))
    corrected(batch_size=2, output_type="np")
    assert not corrected.stats.extra
    assert corrected.overhead() == 0.0


def test_one_image_alone_and_in_a_batch(cached: DeployedPipeline) -> None:
    corrected = correct.wrap(cached, Plan(made_up_sheet(cached)), batch_invariant=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = corrected(batch_size=2, generator=seeds, output_type="np").images
    alone = corrected(batch_size=1, generator=torch.Generator().manual_seed(4), output_type="np").images
    assert (both[1:] == alone).all()


def test_another_artifact_is_refused(cached: DeployedPipeline, tiny_artifact: Callable[[str], Path]) -> None:
    other = deploy.load(tiny_artifact("deepcache-2"))
    with pytest.raises(PlanError, match="fitted to the artifact .*, but this is .*`errata sheet`"):
        correct.wrap(other, Plan(made_up_sheet(cached)))


def test_loading_checks_the_artifact(
    cached: DeployedPipeline, tiny_artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    made_up_sheet(cached).save(tmp_path / "sheet.safetensors")
    assert Sheet.load(tmp_path / "sheet.safetensors", cached) == made_up_sheet(cached)
    with pytest.raises(PlanError, match="fitted to the artifact"):
        Sheet.load(tmp_path / "sheet.safetensors", deploy.load(tiny_artifact("deepcache-2")))


def test_a_plan_that_it_was_not_fitted_under_is_told(cached: DeployedPipeline) -> None:
    sheet = made_up_sheet(cached)
    with pytest.warns(UserWarning, match="with no other method, and is used with Forecast"):
        correct.wrap(cached, Plan(sheet) + Plan(Forecast()))
    fitted = made_up_sheet(cached, Plan(Forecast()))
    with pytest.warns(UserWarning, match="Forecast at other steps or with other options"):
        correct.wrap(cached, Plan(fitted) + Plan(Forecast(order=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        correct.wrap(cached, Plan(fitted) + Plan(Forecast()))


def test_another_number_of_steps_is_refused_or_interpolated(cached: DeployedPipeline) -> None:
    sheet = made_up_sheet(cached)
    levels = dataclasses.replace(sheet.facts.levels, values=sheet.facts.levels.values[1:])
    shorter = made_up_sheet(cached, levels=levels)
    with pytest.raises(PlanError, match="5 denoiser calls, and this run makes 6"):
        correct.wrap(cached, Plan(shorter))
    with pytest.warns(UserWarning, match="3 steps"):
        mapped = cached.at_steps(3)
    with pytest.warns(UserWarning, match="6 denoiser calls, and this run makes 3.* interpolated"):
        corrected = correct.wrap(mapped, Plan(sheet))
    seed = torch.Generator().manual_seed(0)
    images = torch.from_numpy(corrected(batch_size=2, generator=seed, output_type="np").images)
    assert not torch.equal(sample(mapped, Plan.none()), images)


def test_attached_it_corrects_the_pipelines_own_call(cached: DeployedPipeline) -> None:
    clone = cached.clone()
    plan = Plan(made_up_sheet(cached))
    with correct.attach(clone.pipe, plan):
        attached = clone.pipe(
            batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
    assert torch.equal(torch.from_numpy(attached), sample(cached, plan))


def test_a_sheet_of_an_artifact_serves_its_engine(
    tiny_artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    path = tiny_artifact("deepcache-3")
    engine = deploy.load(deploy.export_onnx(path, tmp_path / "engine"))
    deployed = deploy.load(path, backend="reference")
    plan = Plan(made_up_sheet(deployed))
    found, expected = sample(engine, plan), sample(deployed, plan)
    assert torch.allclose(found, expected, atol=1e-4)
    assert float((sample(engine, Plan.none()) - expected).abs().max()) > 1e-3
