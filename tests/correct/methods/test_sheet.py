"""A sheet on an artifact: what it acts on, and where it is refused or warns."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata import correct, deploy
from errata.correct import IEC, Forecast, Hindsight, Plan, Sheet
from errata.correct.sheets.fitted_maps import CallLevels, FittedMaps
from errata.correct.sheets.sheet_file import Measurement, SheetFacts
from errata.deploy import DeployedPipeline
from errata.errors import PlanError

MATRIX, BIAS = 1.25, 0.125
MEASURED = Measurement(images=2, psnr=1.0, corrected_psnr=2.0, change=1.0, low=0.5, high=1.5)


@pytest.fixture(scope="module")
def cached(tiny_artifact: Callable[[str], Path]) -> DeployedPipeline:
    return deploy.load(tiny_artifact("deepcache-3"))


def sheet_for(deployed: DeployedPipeline, plan: Plan | None = None, **facts: Any) -> Sheet:
    """One factor and one offset for every evaluation of either kind."""
    schedule = deployed.schedule
    corrected = correct.wrap(deployed, Plan.none() if plan is None else plan)
    methods, steps = Sheet.parts_of(corrected)
    calls, kinds = schedule.num_steps, 2 if schedule.has_cache else 1
    rows, channels = calls * kinds, deployed.pipe.unet.config.out_channels
    maps = FittedMaps(
        call=torch.arange(calls).repeat(kinds),
        kind=torch.arange(kinds, dtype=torch.uint8).repeat_interleave(calls),
        matrix=MATRIX * torch.eye(channels).repeat(rows, 1, 1),
        bias=torch.full((rows, channels), BIAS),
    )
    told: dict[str, Any] = {
        "artifact": deployed.manifest.sha256,
        "teacher": "float",
        "plan": methods,
        "plan_steps": steps,
        "samples": 8,
        "seed": 0,
        "levels": CallLevels.of(corrected.levels, deployed.denoiser.timesteps, schedule),
        "measured": MEASURED,
    }
    return Sheet(maps=maps, facts=SheetFacts(**told | facts))


class Mapped:
    """The artifact's denoiser with the map written out, and a count of its calls."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def full(self, x: Tensor, step: int, cond: Any) -> tuple[Tensor, Tensor | None]:
        prediction, feature = self._denoiser.full(x, step, cond)
        return MATRIX * prediction + BIAS, feature

    def cached(self, x: Tensor, step: int, cond: Any, feature: Tensor, **options: Any) -> Tensor:
        return MATRIX * self._denoiser.cached(x, step, cond, feature, **options) + BIAS


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
    sheet = sheet_for(cached, plan)
    better = cached.clone()
    better.pipe.unet.denoiser = Mapped(better.denoiser)
    expected, plain = sample(better, plan), sample(cached, plan)
    found = sample(cached, Plan(sheet) + plan)
    assert torch.allclose(found, expected, atol=1e-5)
    assert float((plain - expected).abs().max()) > 1e-3
    assert torch.equal(sample(cached, plan + Plan(sheet)), found)  # its place in the plan has no meaning


def test_only_the_chosen_steps_are_corrected(cached: DeployedPipeline) -> None:
    sheet = sheet_for(cached)
    some = sample(cached, Plan(sheet, steps="first:2"))
    assert not torch.equal(some, sample(cached, Plan(sheet)))
    assert not torch.equal(some, sample(cached, Plan.none()))


def test_it_takes_no_evaluation_and_no_look_at_the_steps(cached: DeployedPipeline) -> None:
    corrected = correct.wrap(cached, Plan(sheet_for(cached)))
    corrected(batch_size=2, output_type="np")
    assert not corrected.stats.extra
    assert corrected.overhead() == 0.0


def test_one_image_alone_and_in_a_batch(cached: DeployedPipeline) -> None:
    corrected = correct.wrap(cached, Plan(sheet_for(cached)), batch_invariant=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = corrected(batch_size=2, generator=seeds, output_type="np").images
    alone = corrected(batch_size=1, generator=torch.Generator().manual_seed(4), output_type="np").images
    assert (both[1:] == alone).all()


def test_another_artifact_is_refused(cached: DeployedPipeline, tiny_artifact: Callable[[str], Path]) -> None:
    other = deploy.load(tiny_artifact("deepcache-2"))
    with pytest.raises(PlanError, match="fitted to the artifact .*, but this is .*`errata sheet`"):
        correct.wrap(other, Plan(sheet_for(cached)))


def test_loading_checks_the_artifact(
    cached: DeployedPipeline, tiny_artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    sheet_for(cached).save(tmp_path / "sheet.safetensors")
    assert Sheet.load(tmp_path / "sheet.safetensors", cached) == sheet_for(cached)
    with pytest.raises(PlanError, match="fitted to the artifact"):
        Sheet.load(tmp_path / "sheet.safetensors", deploy.load(tiny_artifact("deepcache-2")))


def test_a_plan_that_it_was_not_fitted_under_is_told(cached: DeployedPipeline) -> None:
    sheet = sheet_for(cached)
    with pytest.warns(UserWarning, match="with no other method, and is used with Forecast"):
        correct.wrap(cached, Plan(sheet) + Plan(Forecast()))
    fitted = sheet_for(cached, Plan(Forecast()))
    with pytest.warns(UserWarning, match="Forecast at other steps or with other options"):
        correct.wrap(cached, Plan(fitted) + Plan(Forecast(order=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        correct.wrap(cached, Plan(fitted) + Plan(Forecast()))


def test_another_number_of_steps_is_refused_or_interpolated(cached: DeployedPipeline) -> None:
    sheet = sheet_for(cached)
    levels = dataclasses.replace(sheet.facts.levels, values=sheet.facts.levels.values[1:])
    shorter = sheet_for(cached, levels=levels)
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
    plan = Plan(sheet_for(cached))
    with correct.attach(clone.pipe, plan):
        attached = clone.pipe(
            batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
    assert torch.equal(torch.from_numpy(attached), sample(cached, plan))
