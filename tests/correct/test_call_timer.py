"""Calls are timed where they happen, and nothing of the caller's is changed."""

import time
from typing import Any

import pytest
import torch

from errata import calibration, compress, deploy
from errata.correct import IEC, Plan
from errata.correct.call_timer import CallTimer
from errata.correct.sampling import FloatSampler, PlanSampler, default_inputs
from errata.deploy import DeployedPipeline


@pytest.fixture(scope="module")
def cached(tiny_pipeline: Any, tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    """Steps 0 and 2 of four are full."""
    folder = tmp_path_factory.mktemp("cached")
    recording = calibration.collect(
        tiny_pipeline, folder / "calibration", num_inference_steps=4, num_samples=2, batch_size=2
    )
    compressed = compress.apply(tiny_pipeline, recording, "w8a8+deepcache-2", folder / "compressed")
    return deploy.load(deploy.export(compressed, folder / "artifact"), device="cpu")


def test_every_call_of_a_run_is_timed(cached: DeployedPipeline) -> None:
    timer = CallTimer()
    watched = timer.watch(cached)
    plan = Plan(IEC(tolerance=0), "all")
    sampler = PlanSampler(watched, plan, seed=0, inputs=default_inputs, timer=timer)
    sampled = sampler.sample(range(2))
    counts = {kind: len(seconds) for kind, seconds in sampled.calls.items()}
    assert counts == {
        "full": sampled.base["full"] + sampled.extra["full"],
        "cached": sampled.base["cached"],
    }
    total = sum(sum(seconds) for seconds in sampled.calls.values())
    assert 0 < total < sampled.seconds
    assert timer.take() == {}


def test_a_slow_call_is_seen(cached: DeployedPipeline) -> None:
    timer = CallTimer()
    watched = timer.watch(cached)
    inner = watched.denoiser.full

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.05)
        return inner(*args, **kwargs)

    watched.denoiser.full = slowly  # type: ignore[method-assign]
    again = CallTimer()
    again._watch_denoiser(watched.denoiser)
    watched(batch_size=1)
    assert min(again.take()["full"]) > 0.05
    assert min(timer.take()["cached"]) < 0.05


def test_the_artifact_itself_is_not_watched(cached: DeployedPipeline) -> None:
    timer = CallTimer()
    watched = timer.watch(cached)
    cached(batch_size=1)
    assert timer.take() == {}
    watched(batch_size=1)
    assert set(timer.take()) == {"full", "cached"}
    one = next(iter(cached.pipe.unet.parameters()))
    other = next(iter(watched.pipe.unet.parameters()))
    assert one.data_ptr() == other.data_ptr()


def test_a_float_network_is_timed_and_let_go(tiny_pipeline: Any) -> None:
    sampler = FloatSampler(tiny_pipeline, num_inference_steps=3, seed=0, inputs=default_inputs)
    sampled = sampler.sample(range(2))
    assert sampled.base == {"full": 3.0}
    assert len(sampled.calls["full"]) == 3
    assert not tiny_pipeline.unet._forward_hooks
    assert not tiny_pipeline.unet._forward_pre_hooks
    assert torch.is_tensor(sampled.images)
