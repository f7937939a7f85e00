"""A pipeline that returns its raw sample, a denoiser in closed form, and artifacts made of them."""

import copy
import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from torch import Tensor

from errata import calibration, compress, deploy
from errata.deploy import DeployedPipeline
from errata.runtime.denoiser import Denoiser, UNetDenoiser
from errata.runtime.schedule import CacheSchedule, StepKind
from errata.runtime.step_context import StepContext
from errata.runtime.stepped_unet import SteppedUNet
from errata.runtime.unet import BranchedUNet

Deploy = Callable[..., DeployedPipeline]


class LoopPipeline(DiffusionPipeline):
    """Samples with any scheduler and returns the last sample as it is, neither scaled nor clamped."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, latents: Tensor, num_inference_steps: int, generator: Any = None, **options: Any
    ) -> Tensor:
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = generator
        x = latents * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            prediction = self.predict(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(prediction, t, x, **options)[0]
        return x

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        prediction: Tensor = self.unet(x, t).sample
        return prediction


class ClosedForm:
    """ε(x, i) = `function`(x, i); the feature of x is 2x, and a cached call returns ε(feature / 2, i).

    Counts what it is asked: `calls` holds the kind and the batch size of every call.
    """

    def __init__(
        self,
        function: Callable[[Tensor, int], Tensor],
        schedule: CacheSchedule,
        timesteps: tuple[float, ...],
        costs: Mapping[StepKind, float],
    ) -> None:
        self.function = function
        self.schedule = schedule
        self.timesteps = timesteps
        self.costs = costs
        self.calls: list[tuple[StepKind, int]] = []

    def full(self, x: Tensor, step: int, cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        self.calls.append(("full", x.shape[0]))
        return self.function(x, step), 2 * x if self.schedule.has_cache else None

    def cached(
        self,
        x: Tensor,
        step: int,
        cond: Mapping[str, Tensor],
        feature: Tensor,
        *,
        is_extrapolated: bool = False,
    ) -> Tensor:
        self.calls.append(("cached", x.shape[0]))
        assert feature.shape == x.shape
        return self.function(feature / 2, step)

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        return self.costs[kind]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors are so small here that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def deploy_closed_form() -> Deploy:
    """`deploy(function, scheduler, num_inference_steps, schedule=…)`: an artifact in closed form."""

    def deploy(
        function: Callable[[Tensor, int], Tensor],
        scheduler: Any,
        num_inference_steps: int,
        *,
        schedule: CacheSchedule | None = None,
        costs: Mapping[StepKind, float] | None = None,
        pipeline: type[LoopPipeline] = LoopPipeline,
    ) -> DeployedPipeline:
        timesteps = _timesteps(scheduler, num_inference_steps)
        schedule = schedule or CacheSchedule.uncached(len(timesteps))
        denoiser = ClosedForm(function, schedule, timesteps, costs or {"full": 1.0, "cached": 0.25})
        unet = SteppedUNet(denoiser, SimpleNamespace(in_channels=1, sample_size=8))
        return _deployed(pipeline(unet, scheduler), num_inference_steps)

    return deploy


@pytest.fixture
def deploy_unet(tiny_pipeline: DDIMPipeline) -> Deploy:
    """`deploy(scheduler, num_inference_steps, schedule=…)`: an artifact with the tiny UNet."""

    def deploy(
        scheduler: Any,
        num_inference_steps: int,
        *,
        schedule: CacheSchedule | None = None,
        pipeline: type[Any] = LoopPipeline,
        dtype: torch.dtype = torch.float64,
    ) -> DeployedPipeline:
        timesteps = _timesteps(scheduler, num_inference_steps)
        branched = BranchedUNet(copy.deepcopy(tiny_pipeline.unet).to(dtype))
        schedule = schedule or CacheSchedule.uncached(len(timesteps))
        denoiser: Denoiser = UNetDenoiser(branched, StepContext(), schedule, timesteps)
        unet = SteppedUNet(denoiser, branched.unet.config, module=branched)
        return _deployed(pipeline(unet=unet, scheduler=scheduler), num_inference_steps)

    return deploy


@pytest.fixture
def loop_pipeline() -> type[LoopPipeline]:
    return LoopPipeline


@pytest.fixture(scope="session")
def pretended() -> ModuleType:
    """The module `fake_accelerator`, beside this file; under `--import-mode=importlib` no import finds it."""
    path = Path(__file__).with_name("fake_accelerator.py")
    spec = importlib.util.spec_from_file_location("fake_accelerator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ddim() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


def _timesteps(scheduler: Any, num_inference_steps: int) -> tuple[float, ...]:
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(num_inference_steps)
    return tuple(float(t) for t in fresh.timesteps)


def _deployed(pipe: DiffusionPipeline, num_inference_steps: int) -> DeployedPipeline:
    pipe.set_progress_bar_config(disable=True)
    no_manifest = cast(Any, None)  # correction reads none of it
    return DeployedPipeline(pipe, num_inference_steps=num_inference_steps, manifest=no_manifest, report=[])


@pytest.fixture(scope="session")
def digits_artifact(digits: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`digits_artifact("deepcache-3", steps=6)`: an artifact of the digits; never write into it."""

    @functools.cache
    def make(recipe: str, *, steps: int) -> Path:
        root = tmp_path_factory.mktemp("digits")
        recorded = calibration.calibrate(
            digits, root / "set", num_inference_steps=steps, num_samples=2, batch_size=2
        )
        return deploy.deploy(compress.compress(digits, recorded, recipe, root / "c"), root / "a")

    return make
