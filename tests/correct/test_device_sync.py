"""On an accelerator, a correction waits once a run, and once a step where a stopping rule of IEC asks."""

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from sheets import made_up_sheet
from torch import Tensor

from errata.correct import (
    IEC,
    CorrectedPipeline,
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
from errata.correct.device_sync import on_host, sent
from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers 0.42, NumPy 2

Deploy = Callable[..., DeployedPipeline]
STEPS = 8
NEVER_WAIT = {
    "none": Plan.none(),
    "IEC": Plan(IEC()),
    "IEC official": Plan(IEC.official()),
    "SecondOrder": Plan(SecondOrder(cache_after="replace")),
    "Forecast": Plan(Forecast(order=2)),
    "Forecast, Hermite": Plan(Forecast(basis="hermite")),
    "FittedForecast": Plan(FittedForecast(weights=((),) * 5 + ((1.4, -0.4),) * 3)),
    "Lookahead": Plan(Lookahead()),
    "Lookahead 2 + Hindsight": Plan(Lookahead(order=2)) + Plan(Hindsight()),
    "Refresh": Plan(Refresh(), "middle"),
    "Hindsight": Plan(Hindsight()),
    "EpsilonScaling": Plan(EpsilonScaling()),
    "DiffIER": Plan(DiffIER(threshold=0.05)),
    "Langevin": Plan(Langevin(iterations=2)),
}
WAIT_ONCE_A_STEP = {
    "IEC 2": Plan(IEC(iterations=2, tolerance=0.05)),
    "IEC 4": Plan(IEC(iterations=4, tolerance=0.05)),
    "IEC 4 official": Plan(IEC(step_size=0.5, iterations=4, tolerance=0.02, stopping="official")),
}


def network(x: Tensor, step: int) -> Tensor:
    """For both halves of a guided batch. Some images converge at once, some later, as their corner has it."""
    first, second = (torch.tanh(3 * half[:, :, :1, :1]) * torch.tanh(half) for half in x.chunk(2))
    return torch.cat([first, 0.8 * second])


def latents() -> Tensor:
    x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    x[:, :, 0, 0] = torch.tensor([0.001, 0.01, 0.05, 0.3, 2.0])[:, None]
    return x


class Watched:
    """Samples with guidance in one batch; every step is a phase of the device, and so is what follows."""

    def __init__(self, deploy: Deploy, pretended: ModuleType, loop_pipeline: type[Any]) -> None:
        self.pretended, self.device = pretended, None
        outer = self

        class Pipeline(loop_pipeline):  # type: ignore[misc]
            guidance_scale = 2.0

            def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
                if outer.keeps_timesteps:
                    set_timesteps = self.scheduler.set_timesteps
                    self.scheduler.set_timesteps = functools.partial(set_timesteps, device=pretended.DEVICE)
                drawn: Tensor = super().__call__(*args, **kwargs)
                outer.next_phase()
                return drawn

            def predict(self, x: Tensor, t: Tensor) -> Tensor:
                outer.next_phase()
                first, second = self.unet(torch.cat([x, x]), t).sample.chunk(2)
                guided: Tensor = first + 2.0 * (second - first)
                return guided

        self.deploy = functools.partial(deploy, pipeline=Pipeline)
        self.keeps_timesteps = False

    def next_phase(self) -> None:
        if self.device is not None:
            self.device.next_phase()

    def sample(self, corrected: CorrectedPipeline, **options: Any) -> tuple[Tensor, list[list[str]]]:
        """What is drawn, in main memory, and who waited at each step; what follows them is left out."""
        with self.pretended.accelerator() as self.device:
            drawn = corrected(latents=self.pretended.to_device(latents()), **options)
        assert self.device is not None
        waits, self.device = self.device.waits[1:-1], None
        return drawn.held, waits


@pytest.fixture
def watched(deploy_closed_form: Deploy, pretended: ModuleType, loop_pipeline: type[Any]) -> Watched:
    return Watched(deploy_closed_form, pretended, loop_pipeline)


@pytest.fixture
def deployed(watched: Watched, ddim: DDIMScheduler) -> DeployedPipeline:
    schedule = CacheSchedule.uniform(STEPS, interval=4, branch=1)
    return watched.deploy(network, ddim, STEPS, schedule=schedule)


def test_the_pretended_device_notices(pretended: ModuleType) -> None:
    """Whatever makes a program wait for CUDA, and what CUDA refuses."""
    with pretended.accelerator() as device:
        x = pretended.to_device(torch.tensor([1.0, 2.0]))
        for waiting in (
            lambda: x[0].item(),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: bool((x > 1).any()),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: torch.equal(x, x),
            lambda: torch.zeros(2).to(x.device),
            lambda: torch.zeros(2).copy_(x),
            lambda: torch.arange(3)[x[0].long()],
        ):
            before = len(device.waits[0])
            waiting()
            assert len(device.waits[0]) > before
        before = len(device.waits[0])
        doubled: Any = 2 * torch.where(x > 1, x, 0.0)
        assert doubled.held.tolist() == [0.0, 4.0]
        assert sent(torch.ones(2), x).device == x.device
        x += torch.tensor(1.0)  # a scalar in main memory
        assert x.held.tolist() == [2.0, 3.0]
        assert len(device.waits[0]) == before
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2)


@pytest.mark.parametrize("name", NEVER_WAIT)
def test_no_step_waits(name: str, watched: Watched, deployed: DeployedPipeline) -> None:
    """But for the first corrected one, at which the guidance is recognised."""
    corrected = wrap(deployed, NEVER_WAIT[name])
    here = corrected(latents=latents())
    stats = corrected.stats
    there, waits = watched.sample(corrected)
    waiting = [step for step, who in enumerate(waits) if who]
    assert len(waits) == STEPS
    assert len(waiting) <= 1, waits
    assert all("guidance.py" in each for step in waiting for each in waits[step])
    assert torch.equal(here, there)
    assert corrected.stats == stats


def test_a_sheet_waits_for_its_own_numbers_alone(watched: Watched, deployed: DeployedPipeline) -> None:
    """They are sent to the device once, for full and for cached calls."""
    deployed.manifest = SimpleNamespace(sha256="ab" * 32, artifact_sha256="ab" * 32)  # type: ignore[assignment]
    corrected = wrap(deployed, Plan(made_up_sheet(deployed, channels=2)))
    here = corrected(latents=latents())
    there, waits = watched.sample(corrected)
    assert sum(bool(who) for who in waits) <= 2
    assert all("output_map.py" in each for who in waits for each in who)
    again, waits = watched.sample(corrected)
    assert not any(waits)
    assert torch.equal(here, there)
    assert torch.equal(here, again)


@pytest.mark.parametrize("name", WAIT_ONCE_A_STEP)
def test_a_stopping_rule_waits_once_a_step(name: str, watched: Watched, deployed: DeployedPipeline) -> None:
    """Who stops later is evaluated in vain, but neither images nor what is reported of them change."""
    corrected = wrap(deployed, WAIT_ONCE_A_STEP[name])
    here = corrected(latents=latents())
    stats = corrected.stats
    there, waits = watched.sample(corrected)
    asked = [[each for each in who if "guidance.py" not in each] for who in waits]
    assert {step: len(who) for step, who in enumerate(asked) if who} == dict.fromkeys(corrected.steps, 1)
    assert torch.equal(here, there)
    for one, other in zip(stats.steps, corrected.stats.steps, strict=True):
        assert (one.iterations, one.residuals, one.diverged) == (
            other.iterations,
            other.residuals,
            other.diverged,
        )
        assert one.extra.get("full", 0) <= other.extra.get("full", 0)


def test_samples_do_stop_at_different_times(watched: Watched, deployed: DeployedPipeline) -> None:
    """Else the test before this one would show nothing."""
    corrected = wrap(deployed, WAIT_ONCE_A_STEP["IEC 4"])
    watched.sample(corrected)
    taken = {number for step in corrected.stats.steps for number in step.iterations}
    assert taken >= {1, 2, 4}


SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False),
    "ddim clipped": DDIMScheduler(),
    "ddpm": DDPMScheduler(clip_sample=False),
    "dpm-solver++": DPMSolverMultistepScheduler(),
    "euler": EulerDiscreteScheduler(),
    "pndm": PNDMScheduler(skip_prk_steps=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_previews_do_not_ask_for_timesteps(name: str, watched: Watched) -> None:
    """Pipelines keep them on the device, where a plain run reads them: for the network, and DDPM to step."""
    deployed = watched.deploy(network, SCHEDULERS[name], STEPS)
    corrected = wrap(deployed, Plan(IEC()))
    here = corrected(latents=latents(), generator=torch.Generator().manual_seed(3))
    watched.keeps_timesteps = True
    _, plain = watched.sample(wrap(deployed, Plan.none()), generator=torch.Generator().manual_seed(3))
    there, waits = watched.sample(corrected, generator=torch.Generator().manual_seed(3))
    assert torch.equal(there, here)
    for before, after in zip(plain[1:], waits[1:], strict=True):
        # Noise of a generator in main memory is copied by diffusers: for the step, and for each preview.
        assert len([each for each in after if "torch_utils.py" not in each]) <= len(before), after
        assert any("arguments.py" in each for each in before)


def test_a_timestep_on_an_accelerator_is_not_read_back() -> None:
    """A meta tensor has no value to read, so reading it would fail."""
    elsewhere = torch.tensor(7, device="meta")
    known = on_host(elsewhere, 7.0)
    assert known.device.type == "cpu"
    assert known.dtype == torch.int64
    assert known.item() == 7
    with pytest.raises((NotImplementedError, RuntimeError)):
        on_host(elsewhere, None)


@pytest.mark.parametrize("timestep", [7, torch.tensor(7)])
def test_a_timestep_in_main_memory_stays_as_it_is(timestep: object) -> None:
    assert on_host(timestep, 3.0) is timestep
