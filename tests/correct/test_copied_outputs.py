"""A denoiser that writes every answer into the same memory, as CUDA graphs do, corrects as any other."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, PNDMScheduler
from torch import Tensor

from errata import deploy
from errata.correct import (
    IEC,
    DiffIER,
    EpsilonScaling,
    Forecast,
    Hindsight,
    Langevin,
    Lookahead,
    NoGainError,
    Plan,
    Refresh,
    SecondOrder,
    attach,
    fit_sheet,
    wrap,
)
from errata.deploy import DeployedPipeline
from errata.errors import ErrataError
from errata.runtime.copying_denoiser import CopyingDenoiser
from errata.runtime.denoiser import Denoiser, UNetDenoiser
from errata.runtime.schedule import CacheSchedule, StepKind

Deploy = Callable[..., DeployedPipeline]
STEPS = 8
PLANS = {
    "none": Plan.none(),
    "IEC": Plan(IEC(iterations=3)),
    "IEC, all samples alike": Plan(IEC(iterations=3, stopping="official")),
    "SecondOrder": Plan(SecondOrder(cache_after="replace")),
    "Forecast": Plan(Forecast(order=2)),
    "Lookahead": Plan(Lookahead(order=2)),
    "Refresh": Plan(Refresh(), "middle"),
    "Forecast + Hindsight": Plan(Forecast(order=1)) + Plan(Hindsight()),
    "EpsilonScaling": Plan(EpsilonScaling()),
    "DiffIER": Plan(DiffIER()),
    "Langevin": Plan(Langevin(iterations=2)),
}


class Replayed:
    """Has one buffer for each kind and shape of answer; a call spoils all of them and fills its own.

    Graphs of one pool share memory, so a replay may write over the answers of any other.
    """

    def __init__(self, denoiser: Denoiser, *, reuses_outputs: bool = True) -> None:
        self.denoiser = denoiser
        self.reuses_outputs = reuses_outputs
        self.schedule, self.timesteps = denoiser.schedule, denoiser.timesteps
        self.buffers: dict[tuple[str, torch.Size], Tensor] = {}

    def full(self, x: Tensor, step: int, cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        prediction, feature = self.denoiser.full(x, step, cond)
        self._spoil()
        return self._filled("full", prediction), None if feature is None else self._filled("feature", feature)

    def cached(
        self,
        x: Tensor,
        step: int,
        cond: Mapping[str, Tensor],
        feature: Tensor,
        *,
        is_extrapolated: bool = False,
    ) -> Tensor:
        prediction = self.denoiser.cached(x, step, cond, feature, is_extrapolated=is_extrapolated)
        self._spoil()
        return self._filled("cached", prediction)

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        return self.denoiser.cost(kind, batch_size=batch_size)

    def _spoil(self) -> None:
        for buffer in self.buffers.values():
            buffer.fill_(float("nan"))

    def _filled(self, kind: str, values: Tensor) -> Tensor:
        return self.buffers.setdefault((kind, values.shape), torch.empty_like(values)).copy_(values)


def latents() -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["one batch", "two calls"])
def deployed(
    request: pytest.FixtureRequest,
    deploy_closed_form: Deploy,
    ddim: DDIMScheduler,
    loop_pipeline: type[Any],
) -> DeployedPipeline:
    """An artifact with a cache, guided either way."""
    calls = 1 if request.param == "one batch" else 2

    class Guided(loop_pipeline):  # type: ignore[misc]
        guidance_scale = 2.0

        def predict(self, x: Tensor, t: Tensor) -> Tensor:
            if calls == 2:
                first, second = self.unet(x, t).sample, self.unet(x, t).sample
            else:
                first, second = self.unet(torch.cat([x, x]), t).sample.chunk(2)
            guided: Tensor = first + 2.0 * (second - first)
            return guided

    def network(x: Tensor, step: int) -> Tensor:
        scales = torch.tensor([[1.0, 0.8]] if calls == 1 else [[0.8 if step % 2 else 1.0]])
        return torch.tanh(x + 0.1 * (step // calls)) * scales.repeat_interleave(
            len(x) // scales.shape[1]
        ).view(-1, 1, 1, 1)

    schedule = CacheSchedule.uniform(calls * STEPS, interval=4, branch=1, calls_per_step=calls)
    made = deploy_closed_form(network, ddim, STEPS, schedule=schedule, pipeline=Guided)
    inner: Any = made.denoiser
    inner.timesteps = tuple(time for time in inner.timesteps for _ in range(calls))
    return made


@pytest.mark.parametrize("name", PLANS)
def test_images_are_bit_for_bit_those_of_the_denoiser_inside(name: str, deployed: DeployedPipeline) -> None:
    expected = wrap(deployed, PLANS[name])(latents=latents())
    assert expected.isfinite().all()
    deployed.pipe.unet.denoiser = Replayed(deployed.denoiser)
    corrected = wrap(deployed, PLANS[name])
    assert torch.equal(corrected(latents=latents()), expected)
    with attach(deployed.pipe, PLANS[name]):
        assert torch.equal(deployed.pipe(latents=latents(), num_inference_steps=STEPS), expected)


@pytest.mark.parametrize("deployed", ["two calls"], indirect=True)
def test_an_image_alone_too(deployed: DeployedPipeline) -> None:
    expected = wrap(deployed, PLANS["IEC"], batch_invariant=True)(latents=latents())
    deployed.pipe.unet.denoiser = Replayed(deployed.denoiser)
    assert torch.equal(wrap(deployed, PLANS["IEC"], batch_invariant=True)(latents=latents()), expected)


def test_it_has_to_say_so(deployed: DeployedPipeline) -> None:
    """What it does not say is not known, and shows: the buffers of this one are spoilt by every call."""
    deployed.pipe.unet.denoiser = Replayed(deployed.denoiser, reuses_outputs=False)
    with pytest.raises(ErrataError, match="the denoiser returned NaN"):
        wrap(deployed, PLANS["Forecast"])(latents=latents())


def test_a_history_of_the_scheduler_is_kept(deploy_closed_form: Deploy) -> None:
    """PNDM reads the predictions of four steps, in a plain run too."""
    scheduler = PNDMScheduler(skip_prk_steps=True)
    deployed = deploy_closed_form(lambda x, step: torch.tanh(x), scheduler, STEPS)
    expected = deployed(latents=latents())
    full = deployed.pipe(latents=latents(), num_inference_steps=STEPS)
    deployed.pipe.unet.denoiser = Replayed(deployed.denoiser)
    assert torch.equal(deployed(latents=latents()), expected)
    assert torch.equal(deployed.pipe(latents=latents(), num_inference_steps=STEPS), full)


def test_a_network_that_was_captured_says_so_on_its_denoiser(
    deploy_unet: Deploy, ddim: DDIMScheduler
) -> None:
    deployed = deploy_unet(ddim, STEPS)
    corrected = wrap(deployed, PLANS["IEC"])
    inner = deployed.denoiser
    assert isinstance(inner, UNetDenoiser)
    inner.reuses_outputs = True
    outer: Any = deployed.denoiser
    assert isinstance(outer, CopyingDenoiser)
    assert outer.denoiser is inner
    assert isinstance(corrected.deployed.start().denoiser, CopyingDenoiser)
    inner.reuses_outputs = False
    assert deployed.denoiser is inner


@pytest.mark.parametrize("taught_by", ["float", "self"])
def test_a_sheet_is_fitted_to_what_was_said(
    taught_by: str, digits_artifact: Callable[..., Path], digits: DDIMPipeline
) -> None:
    """A teacher evaluates the artifact between two calls of the run, and spoils what they said."""
    deployed = deploy.load(digits_artifact("w4a8+deepcache-3:branch=1", steps=6)).clone()
    teacher = digits if taught_by == "float" else taught_by
    given: dict[str, Any] = {"samples": 8, "held_out": 8, "batch_size": 8, "progress": False}
    found = []
    for denoiser in (deployed.denoiser, Replayed(deployed.denoiser)):
        deployed.pipe.unet.denoiser = denoiser
        try:
            found.append(fit_sheet(deployed, teacher, **given).maps.matrix)  # type: ignore[arg-type]
        except NoGainError as problem:
            found.append(torch.tensor([problem.measured.psnr, problem.measured.corrected_psnr]))
    assert torch.equal(*found)
    deployed.pipe.unet.denoiser = Replayed(deployed.denoiser, reuses_outputs=False)
    with pytest.raises(ErrataError, match="not finite"):
        fit_sheet(deployed, teacher, **given)  # type: ignore[arg-type]
