"""Artifacts in closed form that return images, methods with a known effect, and features to judge them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from errata.correct.corrector import Correction, Corrector, CorrectorContext, StepView
from errata.deploy import DeployedPipeline
from errata.quality import Reference, statistics
from errata.runtime.schedule import CacheSchedule

STEPS = 12
SHAPE = (1, 4, 4)


class ImagePipeline(DiffusionPipeline):
    """Noise of each image from its own generator, the scheduler's loop, and images in [0, 1]."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int,
        generator: list[torch.Generator],
        num_inference_steps: int,
        output_type: str = "np",
    ) -> SimpleNamespace:
        assert (len(generator), output_type) == (batch_size, "np")
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.stack([torch.randn(SHAPE, generator=each, dtype=torch.float64) for each in generator])
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x)[0]
        images = (0.5 + x / 100).clamp(0, 1)
        return SimpleNamespace(images=images.permute(0, 2, 3, 1).numpy())


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Evaluates every step that it serves anew, in full: what a run without a cache would have predicted."""

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        return tuple(step for step in range(schedule.num_steps) if schedule.kind(step) == "cached")

    def check(self, context: CorrectorContext) -> None: ...

    def corrector(self, context: CorrectorContext) -> Corrector:
        return _Evaluating(context)

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Exact:
        raise NotImplementedError


class _Evaluating(Corrector):
    def at_step(self, view: StepView) -> Correction:
        return Correction(prediction=view.evaluate(view.sample)[0])


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Adds a number to every prediction, at no evaluation."""

    by: float

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        return tuple(range(schedule.num_steps))

    def check(self, context: CorrectorContext) -> None: ...

    def corrector(self, context: CorrectorContext) -> Corrector:
        return _Shifting(self, context)

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Shift:
        raise NotImplementedError


class _Shifting(Corrector):
    def __init__(self, choices: Shift, context: CorrectorContext) -> None:
        super().__init__(context)
        self._by = choices.by

    def at_step(self, view: StepView) -> Correction:
        return Correction(prediction=view.prediction + self._by)


@dataclass(frozen=True, kw_only=True)
class Fickle(Exact):
    """Exact while it is lucky, far off otherwise."""

    is_lucky: Callable[[], bool]

    def corrector(self, context: CorrectorContext) -> Corrector:
        return _Evaluating(context) if self.is_lucky() else _Shifting(Shift(by=1.0), context)


class Quarters(nn.Module):
    """Features: the mean of each quarter of the image."""

    name = "quarters"

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def _epsilon(x: Tensor, step: int) -> Tensor:
    return 0.6 * x + 0.1 * step


@pytest.fixture
def deployed(deploy_closed_form: Callable[..., DeployedPipeline]) -> DeployedPipeline:
    """Every third of twelve steps is full; a cached call costs a quarter of a full one."""
    return _bound(deploy_closed_form, CacheSchedule.uniform(STEPS, interval=3, branch=1))


@pytest.fixture
def uncached(deploy_closed_form: Callable[..., DeployedPipeline]) -> DeployedPipeline:
    """Every step is full."""
    return _bound(deploy_closed_form, CacheSchedule.uncached(STEPS))


@pytest.fixture
def reference(uncached: DeployedPipeline) -> Reference:
    """What the artifact without a cache makes of other noise."""
    network = Quarters()
    generators = [torch.Generator().manual_seed(10_000 + image) for image in range(400)]
    images = uncached(batch_size=400, generator=generators, output_type="np").images
    features = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    return Reference(network, statistics(features), "images of the artifact without a cache", network.name)


def _bound(deploy: Callable[..., DeployedPipeline], schedule: CacheSchedule) -> DeployedPipeline:
    scheduler = DDIMScheduler(clip_sample=False)
    artifact = deploy(_epsilon, scheduler, STEPS, schedule=schedule, pipeline=ImagePipeline)
    manifest: Any = SimpleNamespace(sha256="f" * 64, sampler=SimpleNamespace(num_inference_steps=STEPS))
    artifact.manifest = manifest
    return artifact


@pytest.fixture
def exact() -> type[Exact]:
    return Exact


@pytest.fixture
def shift() -> type[Shift]:
    return Shift


@pytest.fixture
def fickle() -> type[Fickle]:
    return Fickle
