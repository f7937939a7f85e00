"""Fitting a sheet: a known fault is found and repaired, and nothing is promised that was not measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from errata import correct, deploy
from errata.correct import IEC, Forecast, NoGainError, Plan, Sheet, fit_sheet
from errata.correct.sampling import FloatSampler, PlanSampler, default_inputs
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.quality.paired import psnr

FEW: dict[str, Any] = {"samples": 16, "held_out": 16, "batch_size": 8, "progress": False}
FACTOR, OFFSET = 0.9, 0.05


class Faulty:
    """A denoiser that predicts too little, and is off by a constant; of one kind of call, or both."""

    def __init__(self, denoiser: Any, kinds: tuple[str, ...] = ("full", "cached")) -> None:
        self._denoiser, self._kinds = denoiser, kinds
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def full(self, x: Tensor, step: int, cond: Any) -> tuple[Tensor, Tensor | None]:
        prediction, feature = self._denoiser.full(x, step, cond)
        return self._wrong(prediction, "full"), feature

    def cached(self, x: Tensor, step: int, cond: Any, feature: Tensor, **options: Any) -> Tensor:
        return self._wrong(self._denoiser.cached(x, step, cond, feature, **options), "cached")

    def _wrong(self, prediction: Tensor, kind: str) -> Tensor:
        self.calls += 1
        return FACTOR * prediction + OFFSET if kind in self._kinds else prediction


@pytest.fixture(scope="module")
def load_faulty(tiny_artifact: Callable[[str], Path]) -> Callable[..., DeployedPipeline]:
    def load(recipe: str, kinds: tuple[str, ...] = ("full", "cached")) -> DeployedPipeline:
        deployed = deploy.load(tiny_artifact(recipe)).clone()
        deployed.pipe.unet.denoiser = Faulty(deployed.denoiser, kinds)
        deployed.pipe.set_progress_bar_config(disable=True)
        return deployed

    return load


@pytest.fixture(scope="module")
def repaired(load_faulty: Callable[..., DeployedPipeline], tiny_pipeline: DDIMPipeline) -> Sheet:
    return fit_sheet(load_faulty("w8a8"), tiny_pipeline, **FEW)


def images(deployed: DeployedPipeline, plan: Plan, seed: int = 900) -> Tensor:
    return PlanSampler(deployed, plan, seed=seed, inputs=default_inputs).sample(range(8)).images


def test_a_known_fault_is_found(repaired: Sheet) -> None:
    """W8A8 adds next to nothing of its own: M is 1 / 0.9, b is -0.05 / 0.9."""
    assert repaired.maps.call.tolist() == list(range(6))
    matrix, bias = repaired.maps.matrix.flatten(), repaired.maps.bias.flatten()
    assert torch.allclose(matrix, torch.full_like(matrix, 1 / FACTOR), atol=8e-3)
    assert torch.allclose(bias, torch.full_like(bias, -OFFSET / FACTOR), atol=4e-3)
    assert abs(1 / FACTOR - 1) > 10 * 8e-3
    assert OFFSET / FACTOR > 10 * 4e-3


def test_images_get_closer_on_other_noise(
    repaired: Sheet, load_faulty: Callable[..., DeployedPipeline], tiny_pipeline: DDIMPipeline
) -> None:
    deployed = load_faulty("w8a8")
    right = FloatSampler(tiny_pipeline, num_inference_steps=6, seed=900, inputs=default_inputs).sample(
        range(8)
    )
    plain, corrected = (
        psnr(images(deployed, plan), right.images).mean() for plan in (Plan.none(), Plan(repaired))
    )
    assert corrected > plain + 6
    measured = repaired.facts.measured
    assert measured.images == 8
    assert measured.corrected_psnr - measured.psnr == pytest.approx(measured.change)
    assert 6 < measured.low < measured.change < measured.high


def test_the_same_request_gives_the_same_bytes(
    repaired: Sheet, load_faulty: Callable[..., DeployedPipeline], tiny_pipeline: DDIMPipeline
) -> None:
    assert fit_sheet(load_faulty("w8a8"), tiny_pipeline, **FEW).to_bytes() == repaired.to_bytes()


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("batches", [1, 3])
def test_a_stopped_fit_goes_on_to_the_same_bytes(
    batches: int,
    repaired: Sheet,
    load_faulty: Callable[..., DeployedPipeline],
    tiny_pipeline: DDIMPipeline,
    tmp_path: Path,
) -> None:
    """Stopped in the fit, and between choosing and measuring."""
    deployed, kept = load_faulty("w8a8"), tmp_path / "sheet.partial"

    def stop(indices: range) -> dict[str, int]:
        if not stopping:
            return {"batch_size": len(indices)}
        left[0] -= 1
        if left[0] < 0:
            raise _StoppedError
        return {"batch_size": len(indices)}

    stopping, left = [True], [5 + {1: 1, 3: 5}[batches]]  # the request asks for all inputs first
    with pytest.raises(_StoppedError):
        fit_sheet(deployed, tiny_pipeline, **FEW, inputs=stop, journal=kept)
    finished = len(list((kept / "stages").iterdir()))
    assert finished >= 1
    stopping.clear()
    sheet = fit_sheet(deployed, tiny_pipeline, **FEW, inputs=stop, journal=kept)
    assert sheet.to_bytes() == repaired.to_bytes()
    assert not kept.exists()


def test_kept_work_of_another_request_is_refused(
    load_faulty: Callable[..., DeployedPipeline], tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    deployed, kept = load_faulty("w8a8"), tmp_path / "sheet.partial"
    calls = iter(range(100))

    def stop(indices: range) -> dict[str, int]:
        if next(calls) > 5:
            raise _StoppedError
        return {"batch_size": len(indices)}

    with pytest.raises(_StoppedError):
        fit_sheet(deployed, tiny_pipeline, **FEW, inputs=stop, journal=kept)
    with pytest.raises(PlanError, match="another request.*seed"):
        fit_sheet(deployed, tiny_pipeline, **FEW, seed=5, journal=kept)


def test_it_is_fitted_along_the_plan_that_it_is_used_with(
    load_faulty: Callable[..., DeployedPipeline], tiny_pipeline: DDIMPipeline
) -> None:
    plan = Plan(Forecast()) + Plan(IEC(), steps="first:1")
    sheet = fit_sheet(load_faulty("deepcache-3"), tiny_pipeline, plan=plan, **FEW)
    assert [part["type"] for part in sheet.facts.plan] == ["Forecast", "IEC"]
    assert sheet.facts.plan_steps == ("4-5", "0")
    assert sheet.maps.kind.tolist() == [0, 0, 1, 1, 1, 1]
    assert sheet.maps.call.tolist() == [0, 3, 1, 2, 4, 5]


def test_an_artifact_teaches_its_own_cached_calls(load_faulty: Callable[..., DeployedPipeline]) -> None:
    """The fault is in cached calls alone, so the artifact itself knows better."""
    deployed = load_faulty("deepcache-3", ("cached",))
    sheet = fit_sheet(deployed, "self", **FEW)
    assert sheet.facts.teacher == "self"
    assert sheet.maps.kind.tolist() == [1, 1, 1, 1]
    assert sheet.facts.measured.low > 3


def test_what_does_not_help_is_not_returned(
    tiny_artifact: Callable[[str], Path], tiny_pipeline: DDIMPipeline
) -> None:
    """Nothing is wrong with full calls of a network in floating point."""
    deployed = deploy.load(tiny_artifact("deepcache-3"))
    everywhere = Plan(correct.Refresh(), "all")
    with pytest.raises(NoGainError, match="does not help: on 8 images") as caught:
        fit_sheet(deployed, tiny_pipeline, plan=everywhere, **FEW)
    assert caught.value.measured.low <= 0


def test_the_artifact_stays_as_it_is(
    load_faulty: Callable[..., DeployedPipeline], tiny_pipeline: DDIMPipeline
) -> None:
    deployed = load_faulty("w8a8")
    before = images(deployed, Plan.none())
    fit_sheet(deployed, tiny_pipeline, **FEW)
    assert torch.equal(images(deployed, Plan.none()), before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"samples": 4}, "samples must be a whole number, 8 or more"),
        ({"held_out": 2}, "held_out must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_choices_are_refused_before_any_image(
    changes: dict[str, int],
    reason: str,
    load_faulty: Callable[..., DeployedPipeline],
    tiny_pipeline: DDIMPipeline,
) -> None:
    deployed = load_faulty("w8a8")
    with pytest.raises(PlanError, match=reason):
        fit_sheet(deployed, tiny_pipeline, **FEW | changes)
    assert deployed.denoiser.calls == 0  # type: ignore[attr-defined]


def test_a_wrong_teacher_is_refused(
    load_faulty: Callable[..., DeployedPipeline],
    tiny_pipeline: DDIMPipeline,
    make_plain_unet: Callable[..., Any],
) -> None:
    deployed = load_faulty("w8a8")
    other = DDIMPipeline(unet=make_plain_unet(), scheduler=tiny_pipeline.scheduler)
    with pytest.raises(PlanError, match="not the one that the artifact was made from"):
        fit_sheet(deployed, other, **FEW)
    with pytest.raises(PlanError, match="has no cache"):
        fit_sheet(deployed, "self", **FEW)
    with pytest.raises(TypeError, match="the teacher is 'me'"):
        fit_sheet(deployed, "me", **FEW)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a loaded artifact"):
        fit_sheet(tiny_pipeline, tiny_pipeline, **FEW)  # type: ignore[arg-type]


def test_a_sheet_is_not_fitted_under_another_one(
    repaired: Sheet, load_faulty: Callable[..., DeployedPipeline], tiny_pipeline: DDIMPipeline
) -> None:
    with pytest.raises(PlanError, match="has a sheet already"):
        fit_sheet(load_faulty("w8a8"), tiny_pipeline, plan=Plan(repaired), **FEW)
