"""What a pipeline does around its network is recognised, or refused; never guessed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from errata.compress.network.run import UNetCall
from errata.correct.guidance import Guidance, Recogniser, asked_scale
from errata.errors import PlanError


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
