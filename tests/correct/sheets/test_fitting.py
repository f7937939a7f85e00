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
STEPS = 6


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
def artifact(digits_artifact: Callable[..., Path]) -> Path:
    """A cache and nothing else, so full calls are those of the float network."""
    return digits_artifact("deepcache-3", steps=STEPS)


@pytest.fixture(scope="module")
def load_faulty(artifact: Path) -> Callable[..., DeployedPipeline]:
    def load(*kinds: str) -> DeployedPipeline:
        deployed = deploy.load(artifact).clone()
        deployed.pipe.unet.denoiser = Faulty(deployed.denoiser, kinds or ("full", "cached"))
        deployed.pipe.set_progress_bar_config(disable=True)
        return deployed

    return load


@pytest.fixture(scope="module")
def repaired(load_faulty: Callable[..., DeployedPipeline], digits: DDIMPipeline) -> Sheet:
    return fit_sheet(load_faulty(), digits, **FEW)


def images(deployed: DeployedPipeline, plan: Plan, seed: int = 900) -> Tensor:
    return PlanSampler(deployed, plan, seed=seed, inputs=default_inputs).sample(range(8)).images


def test_a_known_fault_is_found(repaired: Sheet) -> None:
    """M is 1 / 0.9 and b is -0.05 / 0.9, in cached calls as in full ones."""
    assert repaired.maps.kind.tolist() == [0] * 6 + [1] * 4
    assert repaired.maps.call.tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 4, 5]
    matrix, bias = repaired.maps.matrix.flatten(), repaired.maps.bias.flatten()
    assert torch.allclose(matrix, torch.full_like(matrix, 1 / FACTOR), atol=8e-3)
    assert torch.allclose(bias, torch.full_like(bias, -OFFSET / FACTOR), atol=4e-3)
    assert abs(1 / FACTOR - 1) > 10 * 8e-3
    assert OFFSET / FACTOR > 10 * 4e-3


def test_images_get_closer_on_other_noise(
    repaired: Sheet, load_faulty: Callable[..., DeployedPipeline], digits: DDIMPipeline
) -> None:
    deployed = load_faulty()
    right = FloatSampler(digits, num_inference_steps=STEPS, seed=900, inputs=default_inputs).sample(range(8))
    plain, corrected = (
        psnr(images(deployed, plan), right.images).mean() for plan in (Plan.none(), Plan(repaired))
    )
    assert corrected > plain + 6
    measured = repaired.facts.measured
    assert measured.images == 8
    assert measured.corrected_psnr - measured.psnr == pytest.approx(measured.change)
    assert 6 < measured.low < measured.change < measured.high


def test_the_same_request_gives_the_same_bytes(
    repaired: Sheet, load_faulty: Callable[..., DeployedPipeline], digits: DDIMPipeline
) -> None:
    assert fit_sheet(load_faulty(), digits, **FEW).to_bytes() == repaired.to_bytes()


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("batches", [1, 3])
def test_a_stopped_fit_goes_on_to_the_same_bytes(
    batches: int,
    repaired: Sheet,
    load_faulty: Callable[..., DeployedPipeline],
    digits: DDIMPipeline,
    tmp_path: Path,
) -> None:
    """Stopped in the fit, and between choosing and measuring."""
    deployed, kept = load_faulty(), tmp_path / "sheet.partial"

    def stop(indices: range) -> dict[str, int]:
        if not stopping:
            return {"batch_size": len(indices)}
        left[0] -= 1
        if left[0] < 0:
            raise _StoppedError
        return {"batch_size": len(indices)}

    stopping, left = [True], [5 + {1: 1, 3: 5}[batches]]  # the request asks for all inputs first
    with pytest.raises(_StoppedError):
        fit_sheet(deployed, digits, **FEW, inputs=stop, journal=kept)
    finished = len(list((kept / "stages").iterdir()))
    assert finished >= 1
    stopping.clear()
    sheet = fit_sheet(deployed, digits, **FEW, inputs=stop, journal=kept)
    assert sheet.to_bytes() == repaired.to_bytes()
    assert not kept.exists()


def test_kept_work_of_another_request_is_refused(
    load_faulty: Callable[..., DeployedPipeline], digits: DDIMPipeline, tmp_path: Path
) -> None:
    deployed, kept = load_faulty(), tmp_path / "sheet.partial"
    calls = iter(range(100))

    def stop(indices: range) -> dict[str, int]:
        if next(calls) > 5:
            raise _StoppedError
        return {"batch_size": len(indices)}

    with pytest.raises(_StoppedError):
        fit_sheet(deployed, digits, **FEW, inputs=stop, journal=kept)
    with pytest.raises(PlanError, match="another request.*seed"):
        fit_sheet(deployed, digits, **FEW, seed=5, journal=kept)


def test_it_is_fitted_along_the_plan_that_it_is_used_with(
    load_faulty: Callable[..., DeployedPipeline], digits: DDIMPipeline
) -> None:
    plan = Plan(Forecast()) + Plan(IEC(), steps="first:1")
    sheet = fit_sheet(load_faulty(), digits, plan=plan, **FEW)
    assert [part["type"] for part in sheet.facts.plan] == ["Forecast", "IEC"]
    assert sheet.facts.plan_steps == ("4-5", "0")
    assert sheet.maps.kind.tolist() == [0] * 6 + [1] * 4


def test_an_artifact_teaches_its_own_cached_calls(load_faulty: Callable[..., DeployedPipeline]) -> None:
    """The fault is in cached calls alone, so the artifact itself knows better."""
    deployed = load_faulty("cached")
    sheet = fit_sheet(deployed, "self", **FEW)
    assert sheet.facts.teacher == "self"
    assert sheet.maps.kind.tolist() == [1, 1, 1, 1]
    assert sheet.maps.call.tolist() == [1, 2, 4, 5]
    assert sheet.facts.measured.low > 3


def test_what_does_not_help_is_not_returned(artifact: Path, digits: DDIMPipeline, tmp_path: Path) -> None:
    """Nothing is wrong with full calls of a network in floating point."""
    deployed = deploy.load(artifact)
    everywhere = Plan(correct.Refresh(), "all")
    with pytest.raises(NoGainError, match="does not help: on 8 images") as caught:
        fit_sheet(deployed, digits, plan=everywhere, **FEW, journal=tmp_path / "work")
    assert caught.value.measured.low <= 0
    assert not (tmp_path / "work").exists()  # it would refuse the next attempt, with more samples


def test_the_artifact_stays_as_it_is(
    load_faulty: Callable[..., DeployedPipeline], digits: DDIMPipeline
) -> None:
    deployed = load_faulty()
    before = images(deployed, Plan.none())
    fit_sheet(deployed, digits, **FEW)
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
    digits: DDIMPipeline,
) -> None:
    deployed = load_faulty()
    with pytest.raises(PlanError, match=reason):
        fit_sheet(deployed, digits, **FEW | changes)
    assert deployed.denoiser.calls == 0  # type: ignore[attr-defined]


def test_a_wrong_teacher_is_refused(
    load_faulty: Callable[..., DeployedPipeline],
    digits: DDIMPipeline,
    make_plain_unet: Callable[..., Any],
    tiny_artifact: Callable[[str], Path],
) -> None:
    deployed = load_faulty()
    other = DDIMPipeline(unet=make_plain_unet(), scheduler=digits.scheduler)
    uncached = deploy.load(tiny_artifact("w8a8"))
    with pytest.raises(PlanError, match="not the one that the artifact was made from"):
        fit_sheet(deployed, other, **FEW)
    with pytest.raises(PlanError, match="has no cache"):
        fit_sheet(uncached, "self", **FEW)
    with pytest.raises(TypeError, match="the teacher is 'me'"):
        fit_sheet(deployed, "me", **FEW)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="takes a loaded artifact"):
        fit_sheet(digits, digits, **FEW)  # type: ignore[arg-type]


def test_a_sheet_is_not_fitted_under_another_one(
    repaired: Sheet, load_faulty: Callable[..., DeployedPipeline], digits: DDIMPipeline
) -> None:
    with pytest.raises(PlanError, match="has a sheet already"):
        fit_sheet(load_faulty(), digits, plan=Plan(repaired), **FEW)
