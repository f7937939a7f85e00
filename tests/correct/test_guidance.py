"""What a pipeline does around its network is recognised, or refused; never guessed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionLatentUpscalePipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Generator, Tensor

from errata.correct.guidance import Guidance, Recogniser, asked_scale
from errata.errors import PlanError
from errata.runtime.run import UNetCall


def random(rows: int = 2, channels: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, channels, 4, 4, generator=Generator().manual_seed(seed)).to(dtype)


X, FIRST, SECOND = random(seed=1), random(seed=2), random(seed=3)


def called(sample: Tensor, prediction: Tensor, *, step: int = 0) -> UNetCall:
    return UNetCall(step, "full", sample, 500.0, {}, prediction, None)


def doubled(first: Tensor = FIRST, second: Tensor = SECOND) -> tuple[UNetCall, ...]:
    return (called(torch.cat([X, X]), torch.cat([first, second])),)


def in_two_calls() -> tuple[UNetCall, ...]:
    return called(X, FIRST), called(X, SECOND, step=1)


def guided(scale: float, first: Tensor = FIRST, second: Tensor = SECOND) -> Tensor:
    return first + scale * (second - first)


def rescaled(scale: float, phi: float) -> Tensor:
    """Lin et al. (2023), equations 15 and 16, image by image."""
    images = []
    for first, second in zip(FIRST, SECOND, strict=True):
        plain = first + scale * (second - first)
        images.append(phi * plain * (second.std() / plain.std()) + (1 - phi) * plain)
    return torch.stack(images)


def recognised(calls: tuple[UNetCall, ...], target: Tensor, pipe: Any = None, **options: Any) -> Guidance:
    return Recogniser(pipe or SimpleNamespace(), **options).recognise(calls, target, X, X)


def raws(calls: tuple[UNetCall, ...]) -> list[Tensor]:
    return [call.prediction for call in calls]


def test_no_guidance() -> None:
    calls = (called(X, FIRST),)
    guidance = recognised(calls, FIRST)
    assert (guidance.copies, guidance.is_guided, guidance.scale) == (1, False, None)
    assert torch.equal(guidance.prediction(raws(calls), X), FIRST)
    with pytest.raises(PlanError, match="changed the network's prediction before it stepped"):
        recognised(calls, 1.001 * FIRST)


@pytest.mark.parametrize("calls", [doubled(), in_two_calls()], ids=["one call", "two calls"])
@pytest.mark.parametrize("scale", [2.0, 7.5, 3.14159265, 0.0, -1.5])
def test_the_scale_is_found_where_nobody_tells_it(calls: tuple[UNetCall, ...], scale: float) -> None:
    guidance = recognised(calls, guided(scale))
    assert guidance.is_guided
    assert guidance.scale == pytest.approx(scale, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(guidance.prediction(raws(calls), X), guided(scale), rtol=0, atol=1e-5)


def test_what_is_told_counts_for_more_than_what_is_fitted() -> None:
    """In half precision a fit is off by some thousandths, and by what depends on the whole batch."""
    half = [part.half() for part in (FIRST, SECOND)]
    scale = 7.123456
    target = guided(scale, *half)
    calls = doubled(*half)
    assert recognised(calls, target, SimpleNamespace(guidance_scale=scale)).scale == scale
    assert recognised(calls, target, asked=scale).scale == scale
    assert recognised(calls, target, SimpleNamespace(guidance_scale=2.0), asked=scale).scale == scale
    fitted = recognised(calls, target, asked=2.0).scale
    assert fitted != scale
    assert fitted == pytest.approx(scale, rel=1e-2)


@pytest.mark.parametrize("phi", [0.3, 0.7])
def test_rescaling(phi: float) -> None:
    pipe = SimpleNamespace(guidance_scale=5.0, guidance_rescale=phi)
    guidance = recognised(doubled(), rescaled(5.0, phi), pipe)
    torch.testing.assert_close(guidance.prediction(raws(doubled()), X), rescaled(5.0, phi), rtol=0, atol=1e-5)
    assert (rescaled(5.0, phi) - guided(5.0)).abs().max() > 1e-2
    with pytest.raises(PlanError, match="neither classifier-free guidance nor its rescaling"):
        recognised(doubled(), rescaled(5.0, phi), SimpleNamespace(guidance_scale=5.0))


def test_a_rescaling_that_the_pipeline_states_and_does_not_do() -> None:
    guidance = recognised(doubled(), guided(5.0), SimpleNamespace(guidance_scale=5.0, guidance_rescale=0.7))
    torch.testing.assert_close(guidance.prediction(raws(doubled()), X), guided(5.0), rtol=0, atol=1e-5)


TYPES = [torch.float32, torch.float16, torch.bfloat16]


def with_arithmetic_in(dtype: torch.dtype, *, channels: int = 4) -> tuple[Tensor, Tensor]:
    """Two predictions as a network makes them: the second is the first and a fifth of something else."""
    first = random(2, channels, seed=4)
    return first.to(dtype), (first + 0.2 * random(2, channels, seed=5)).to(dtype)


def recognised_in(target: Tensor, first: Tensor, second: Tensor, pipe: Any = None) -> Guidance:
    x = random(2, first.shape[1], seed=1).to(first.dtype)
    calls = doubled_of(x, first, second)
    return Recogniser(pipe or SimpleNamespace()).recognise(calls, target, x, x)


def doubled_of(x: Tensor, first: Tensor, second: Tensor) -> tuple[UNetCall, ...]:
    return (called(torch.cat([x, x]), torch.cat([first, second])),)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1.5, 7.5, 15.0])
@pytest.mark.parametrize("is_stated", [True, False])
def test_rounding_is_accepted_and_a_twentieth_is_not(
    dtype: torch.dtype, scale: float, is_stated: bool
) -> None:
    parts = with_arithmetic_in(dtype)
    pipe = SimpleNamespace(guidance_scale=scale) if is_stated else SimpleNamespace()
    target = guided(scale, *parts)
    found = recognised_in(target, *parts, pipe).scale
    assert found == pytest.approx(scale, rel=0 if is_stated else 0.1)
    assert target.dtype == dtype
    for factor in (0.7, 0.95, 1.05):
        with pytest.raises(PlanError, match="neither classifier-free guidance nor its rescaling"):
            recognised_in(factor * target, *parts, pipe)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("scale", [1.5, 7.5, 15.0])
def test_rounding_of_a_rescaling(dtype: torch.dtype, scale: float) -> None:
    """As diffusers' `rescale_noise_cfg` computes it, in the type of the predictions."""
    first, second = with_arithmetic_in(dtype)
    pipe = SimpleNamespace(guidance_scale=scale, guidance_rescale=0.7)
    target = rescale_noise_cfg(guided(scale, first, second), second, guidance_rescale=0.7)
    assert recognised_in(target, first, second, pipe).scale == scale
    with pytest.raises(PlanError, match="neither classifier-free guidance nor its rescaling"):
        recognised_in(0.95 * target, first, second, pipe)


@pytest.mark.parametrize("dtype", TYPES)
def test_guidance_in_a_wider_type(dtype: torch.dtype) -> None:
    """A network in single precision whose predictions are rounded afterwards, or before they are guided."""
    parts = with_arithmetic_in(torch.float32)
    pipe = SimpleNamespace(guidance_scale=7.5)
    rounded = [part.to(dtype) for part in parts]
    for target in (guided(7.5, *parts).to(dtype), guided(7.5, *rounded)):
        assert recognised_in(target, *parts, pipe).scale == 7.5
        with pytest.raises(PlanError, match="neither classifier-free guidance"):
            recognised_in(0.95 * target, *parts, pipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_guidance_in_another_order(dtype: torch.dtype) -> None:
    first, second = with_arithmetic_in(dtype)
    target = 7.5 * second + (1 - 7.5) * first
    assert recognised_in(target, first, second, SimpleNamespace(guidance_scale=7.5)).scale == 7.5


@pytest.mark.parametrize("dtype", TYPES)
def test_one_image_that_is_treated_otherwise_is_noticed(dtype: torch.dtype) -> None:
    parts = with_arithmetic_in(dtype)
    target = guided(7.5, *parts)
    target[1] *= 0.9
    with pytest.raises(PlanError, match="neither classifier-free guidance"):
        recognised_in(target, *parts, SimpleNamespace(guidance_scale=7.5))


@pytest.mark.parametrize("dtype", TYPES)
def test_what_the_network_gets_and_gives_is_compared_as_closely(dtype: torch.dtype) -> None:
    x, prediction = random(seed=1).to(dtype), FIRST.to(dtype)
    recognise = Recogniser(SimpleNamespace()).recognise
    assert not recognise((called(x, prediction),), prediction, x, x).is_guided
    recognise((called((x / 3) * 3, prediction),), (prediction / 3) * 3, x, x)
    with pytest.raises(PlanError, match="the network's input is not the scheduler's sample"):
        recognise((called(0.95 * x, prediction),), prediction, x, x)
    with pytest.raises(PlanError, match="changed the network's prediction before it stepped"):
        recognise((called(x, prediction),), 0.95 * prediction, x, x)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42 under NumPy 2
def test_the_latent_upscaler(dtype: torch.dtype) -> None:
    """What it makes of its network's output is rounded as in the pipeline, before it is guided."""
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(12)
    pipe = StableDiffusionLatentUpscalePipeline.__new__(StableDiffusionLatentUpscalePipeline)
    object.__setattr__(pipe, "scheduler", scheduler)
    for step in (1, 5, 9):
        sigma = scheduler.sigmas[step]
        x = ((sigma**2 + 1).sqrt() * random(channels=4, seed=1)).to(dtype)
        raw = torch.cat(with_arithmetic_in(dtype, channels=5))
        inv_sigma = 1 / (sigma**2 + 1)  # lines 638 to 647 of the pipeline in diffusers 0.42
        noise_pred = inv_sigma * torch.cat([x, x]) + sigma / ((sigma**2 + 1) ** 0.5) * raw[:, :-1]
        target = guided(9.0, *noise_pred.chunk(2))
        scaled = x / (sigma**2 + 1).sqrt()
        calls = (called(torch.cat([scaled, scaled]), raw, step=step),)
        assert Recogniser(pipe, asked=9.0).recognise(calls, target, x, scaled).scale == 9.0
        with pytest.raises(PlanError, match="neither classifier-free guidance"):
            Recogniser(pipe, asked=9.0).recognise(calls, 0.9 * target, x, scaled)


def later(pipe: Any, first: Tensor, change: Callable[[Any], None] = lambda pipe: None) -> Guidance:
    """A later step on an accelerator: values are compared once a run there, and that holds for the others."""
    recogniser = Recogniser(pipe)
    recogniser.recognise(doubled(), first, X, X)
    change(pipe)
    return recogniser.recognise(doubled(), torch.zeros_like(X), X, X, compares_values=False)


def test_the_stated_scale_may_change() -> None:
    pipe = SimpleNamespace(guidance_scale=5.0)
    guidance = later(pipe, guided(5.0), lambda pipe: setattr(pipe, "guidance_scale", 2.0))
    assert guidance.scale == 2.0


def test_a_stated_scale_that_was_wrong_stays_out() -> None:
    assert later(SimpleNamespace(guidance_scale=5.0), guided(3.0)).scale == 3.0


def test_a_rescaling_that_was_not_done_stays_out() -> None:
    pipe = SimpleNamespace(guidance_scale=5.0, guidance_rescale=0.7)
    found = later(pipe, guided(5.0)).prediction(raws(doubled()), X)
    torch.testing.assert_close(found, guided(5.0), rtol=0, atol=1e-5)
    found = later(pipe, rescaled(5.0, 0.7)).prediction(raws(doubled()), X)
    torch.testing.assert_close(found, rescaled(5.0, 0.7), rtol=0, atol=1e-5)


def test_shapes_are_compared_at_every_step() -> None:
    recogniser = Recogniser(SimpleNamespace())
    with pytest.raises(PlanError, match="the scheduler was given 2x6x4x4 for a sample 2x3x4x4"):
        recogniser.recognise(doubled(), random(channels=6), X, X, compares_values=False)


def test_further_channels_are_kept() -> None:
    image = random(channels=2, seed=7)
    seen = torch.cat([torch.cat([X, image], dim=1)] * 2)
    call = called(seen, torch.cat([FIRST, SECOND]))
    guidance = recognised((call,), guided(2.0))
    assert torch.equal(guidance.expand(X, None, call), seen)
    rows = torch.tensor([1])
    other = random(1, seed=9)
    expected = torch.cat([torch.cat([other, image[1:]], dim=1)] * 2)
    assert torch.equal(guidance.expand(other, rows, call), expected)
    assert guidance.network_rows(rows, call).tolist() == [1, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("calls", "target", "message"),
    [
        ((called(2 * X, FIRST),), FIRST, "step 0: the network's input is not the scheduler's sample"),
        (
            (called(torch.cat([X, 2 * X]), torch.cat([FIRST, SECOND])),),
            guided(2.0),
            "network's input is not the scheduler's sample",
        ),
        (
            (called(X, FIRST), called(2 * X, SECOND, step=1)),
            guided(2.0),
            "step 1: the network's input is not",
        ),
        (
            (called(torch.cat([X] * 3), torch.cat([FIRST, SECOND, X])),),
            guided(2.0),
            "the prediction is made of 3 parts",
        ),
        ((called(X, FIRST), called(X[:1], SECOND[:1], step=1)), guided(2.0), "the network was called with"),
        (doubled(), FIRST * SECOND, "neither classifier-free guidance nor its rescaling"),
    ],
    ids=["scaled", "second half", "second call", "three", "smaller", "product"],
)
def test_what_is_not_known_is_refused(calls: tuple[UNetCall, ...], target: Tensor, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        recognised(calls, target)


def test_the_scale_of_a_call() -> None:
    class Guided:
        def __call__(self, prompt: str, guidance_scale: float = 7.5) -> None: ...

    class Unguided:
        def __call__(self, batch_size: int) -> None: ...

    assert asked_scale(Guided(), {"prompt": "a"}) == 7.5
    assert asked_scale(Guided(), {"guidance_scale": 3}) == 3.0
    assert asked_scale(Unguided(), {}) is None
