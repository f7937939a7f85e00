"""Callbacks of a guided pipeline work under correction as they do without; and so does breaking off."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from errata.correct import IEC, CorrectedPipeline, Forecast, Plan, attach, wrap
from errata.deploy import DeployedPipeline

Build = Callable[[str], Any]
Artifact = Callable[[str], DeployedPipeline]
PLAN = Plan(IEC(), "full") + Plan(Forecast(order=1))
STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42, NumPy 2

Change = Callable[[Any, int, dict[str, Any]], dict[str, Any]]


@pytest.fixture(params=["sd 2", "ldm labels split"])
def corrected(request: pytest.FixtureRequest, small_artifact: Artifact) -> CorrectedPipeline:
    """Full steps of the sampler are 0 and 3."""
    return wrap(small_artifact(request.param), PLAN)


@pytest.fixture
def inputs(corrected: CorrectedPipeline, small_pipeline: Build) -> dict[str, Any]:
    is_text = type(corrected.pipe).__name__.startswith("StableDiffusion")
    return dict(small_pipeline("sd 2" if is_text else "ldm labels split").inputs)


def latents(run: Callable[..., Any], inputs: dict[str, Any], change: Change | None = None) -> Tensor:
    """Of two samples; `change` gets pipeline, step and tensors, and returns what takes their place."""
    seeds = [Generator().manual_seed(index) for index in range(2)]
    options = {} if change is None else {"callback_on_step_end": lambda p, i, t, kept: change(p, i, kept)}
    drawn: Tensor = run(generator=seeds, output_type="latent", **options, **inputs).images
    return drawn


def test_a_callback_sees_every_step_and_changes_nothing_by_looking(
    corrected: CorrectedPipeline, inputs: dict[str, Any]
) -> None:
    seen: list[tuple[int, Tensor]] = []

    def look(pipe: Any, index: int, kept: dict[str, Any]) -> dict[str, Any]:
        assert isinstance(pipe, type(corrected.pipe))
        assert pipe is not corrected.pipe
        seen.append((index, kept["latents"].clone()))
        return {}

    expected = latents(corrected, inputs)
    assert torch.equal(latents(corrected, inputs, look), expected)
    assert [index for index, _ in seen] == list(range(STEPS))
    assert torch.equal(seen[-1][1], expected)
    assert (latents(corrected.deployed, inputs) - expected).abs().max() > 1e-2


def test_latents_that_a_callback_changes_are_corrected_from_there(
    corrected: CorrectedPipeline, inputs: dict[str, Any]
) -> None:
    """Step 3 is full, so nothing from before it is left when a callback has replaced the sample."""
    deployed = corrected.deployed
    calls = deployed.schedule.calls_per_step
    fixed = 3 * torch.randn(2, 4, 8, 8, generator=Generator().manual_seed(9))

    def replace(pipe: Any, index: int, kept: dict[str, Any]) -> dict[str, Any]:
        return {"latents": fixed} if index == 2 else {}

    everywhere = Plan(IEC(), "full")
    late = Plan(IEC(), ",".join(str(3 * calls + stream) for stream in range(calls)))
    found = latents(wrap(deployed, everywhere), inputs, replace)
    assert torch.equal(latents(wrap(deployed, late), inputs, replace), found)
    assert (latents(wrap(deployed, everywhere), inputs) - found).abs().max() > 1e-2
    assert (latents(deployed, inputs, replace) - found).abs().max() > 1e-2


def test_a_callback_interrupts(small_artifact: Artifact, small_pipeline: Build) -> None:
    """`pipe._interrupt = True`, as in diffusers' guide; and the next run does not know of it."""
    corrected, inputs = wrap(small_artifact("sd 2"), PLAN), small_pipeline("sd 2").inputs
    expected = latents(corrected, inputs)
    at_step: list[Tensor] = []

    def interrupt(pipe: Any, index: int, kept: dict[str, Any]) -> dict[str, Any]:
        at_step.append(kept["latents"].clone())
        pipe._interrupt = index == 3
        return {}

    found = latents(corrected, inputs, interrupt)
    assert len(at_step) == 4
    assert torch.equal(found, at_step[3])
    assert [step.kind for step in corrected.stats.steps] == ["full", "cached", "cached", "full"]
    assert corrected.stats.extra == {"full": 2.0}
    assert torch.equal(latents(corrected, inputs), expected)
    assert not getattr(corrected.pipe, "_interrupt", False)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_callback_that_fails_leaves_nothing_behind(
    corrected: CorrectedPipeline, inputs: dict[str, Any], error: type[BaseException], step: int
) -> None:
    expected, plain = latents(corrected, inputs), latents(corrected.deployed, inputs)
    scheduler = corrected.pipe.scheduler

    def fail(pipe: Any, index: int, kept: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise error("stop")
        return {}

    with pytest.raises(error, match="stop"):
        latents(corrected, inputs, fail)
    assert corrected.pipe.scheduler is scheduler
    assert "step" not in vars(scheduler)
    assert torch.equal(latents(corrected, inputs), expected)
    assert torch.equal(latents(corrected.deployed, inputs), plain)


def test_a_prompt_in_first_place(small_artifact: Artifact, small_pipeline: Build) -> None:
    corrected, inputs = wrap(small_artifact("sd 2"), PLAN), dict(small_pipeline("sd 2").inputs)
    expected = latents(corrected, inputs)
    prompt = inputs.pop("prompt")
    assert torch.equal(latents(functools.partial(corrected, prompt), inputs), expected)
    assert not torch.equal(latents(functools.partial(corrected, ["c", "c"]), inputs), expected)


def test_images_for_a_single_prompt(small_artifact: Artifact) -> None:
    corrected = wrap(small_artifact("sd 2"), PLAN)
    options = {"num_images_per_prompt": 2, "guidance_scale": 3.0, "return_dict": False}
    (pictures, flags) = corrected("a b", generator=Generator().manual_seed(3), **options)
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    assert flags is None
    assert len(corrected.stats.steps[0].iterations) == 2


def test_an_attached_pipeline_calls_back_too(small_artifact: Artifact, small_pipeline: Build) -> None:
    deployed, inputs = small_artifact("sdxl"), small_pipeline("sdxl").inputs
    expected = latents(wrap(deployed, PLAN), inputs)
    seen: list[int] = []

    def look(pipe: Any, index: int, kept: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        return {}

    with attach(deployed.pipe, PLAN) as attachment:
        assert torch.equal(latents(deployed.pipe, inputs, look), expected)
    assert seen == list(range(STEPS))
    assert attachment.stats.extra == {"full": 2.0}
