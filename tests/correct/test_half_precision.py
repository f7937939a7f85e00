"""In half precision, what a method accumulates is float32, and what it hands on has the pipeline's type."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from errata.correct import (
    IEC,
    DiffIER,
    EpsilonScaling,
    FittedForecast,
    Forecast,
    Hindsight,
    Langevin,
    Lookahead,
    Plan,
    Refresh,
    SecondOrder,
    wrap,
)
from errata.correct.corrector import Correction
from errata.correct.preview import SchedulerStep
from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule

Deploy = Callable[..., DeployedPipeline]
STEPS = 8
PLANS = {
    "IEC": Plan(IEC()),
    "IEC 3": Plan(IEC(iterations=3)),
    "IEC official": Plan(IEC.official("latent")),
    "SecondOrder": Plan(SecondOrder()),
    "Forecast": Plan(Forecast(order=2)),
    "FittedForecast": Plan(FittedForecast(weights=((),) * 5 + ((1.4, -0.4),) * 3)),
    "Lookahead": Plan(Lookahead()),
    "Refresh": Plan(Refresh(), "middle"),
    "Forecast + Hindsight": Plan(Forecast(order=1)) + Plan(Hindsight()),
    "EpsilonScaling": Plan(EpsilonScaling()),
    "DiffIER": Plan(DiffIER(max_iterations=2)),
    "Langevin": Plan(Langevin(snr=0.05)),
}


def network(x: Tensor, step: int) -> Tensor:
    """For both halves of a guided batch, which it tells apart."""
    first, second = (torch.tanh((1 + 0.1 * step) * half) for half in x.chunk(2))
    return torch.cat([first, 0.9 * second])


def latents() -> Tensor:
    return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def deployed(deploy_closed_form: Deploy, ddim: DDIMScheduler, loop_pipeline: type[Any]) -> DeployedPipeline:
    class Guided(loop_pipeline):  # type: ignore[misc]
        guidance_scale = 2.0

        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            first, second = self.unet(torch.cat([x, x]), t).sample.chunk(2)
            guided: Tensor = first + 2.0 * (second - first)
            return guided

    schedule = CacheSchedule.uniform(STEPS, interval=4, branch=1)
    return deploy_closed_form(network, ddim, STEPS, schedule=schedule, pipeline=Guided)


@pytest.fixture
def corrections(monkeypatch: pytest.MonkeyPatch) -> list[Correction]:
    """What the methods of a run hand on."""
    seen: list[Correction] = []
    take_corrected = SchedulerStep.take_corrected

    def watched(pending: SchedulerStep, made: Sequence[Correction]) -> Any:
        seen.extend(made)
        return take_corrected(pending, made)

    monkeypatch.setattr(SchedulerStep, "take_corrected", watched)
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PLANS)
def test_accumulations_are_single_precision(
    name: str, dtype: torch.dtype, deployed: DeployedPipeline, corrections: list[Correction]
) -> None:
    corrected = wrap(deployed, PLANS[name])
    exact = corrected(latents=latents(), generator=torch.Generator().manual_seed(2))
    corrections.clear()
    half = corrected(latents=latents().to(dtype), generator=torch.Generator().manual_seed(2))
    assert half.dtype == dtype
    error = (half.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 8 * torch.finfo(dtype).eps  # eight steps, each rounded
    for each in corrections:
        assert each.prediction.dtype == dtype
        assert all(feature.dtype == dtype for feature in each.features or ())
        accumulated = [values for _, values in each.residuals] + list(each.notes.values())
        accumulated += [value for value in (each.shift, each.prev_sample) if value is not None]
        assert all(value.dtype == torch.float32 for value in accumulated)


def test_hindsight_shifts_by_what_half_precision_cannot_hold(
    deployed: DeployedPipeline, corrections: list[Correction]
) -> None:
    """The jump is a small difference of predictions: the shift is not a sum of rounded ones."""
    wrap(deployed, PLANS["Forecast + Hindsight"])(latents=latents().half())
    shifts = [each.shift for each in corrections if each.shift is not None]
    assert shifts
    assert not any(torch.equal(shift, shift.half().float()) for shift in shifts)
