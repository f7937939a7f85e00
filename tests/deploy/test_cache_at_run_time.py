"""The cache and the step counter of a loaded artifact: whose they are, and what they count."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from errata import deploy
from errata.correct import IEC, Plan, wrap
from errata.deploy import DeployedPipeline
from errata.errors import ArtifactMismatchError, PlanError
from errata.runtime.schedule import CacheSchedule, nearest_steps, schedule_at

Artifact = Callable[[str], Path]
CACHED = "w8a8+deepcache-3"  # calls 0 and 3 of 6 are full


@pytest.fixture
def deployed(tiny_artifact: Artifact) -> DeployedPipeline:
    return deploy.load(tiny_artifact(CACHED))


def sample(pipeline: Any, *, seed: int = 0, batch_size: int = 2, **kwargs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(
        pipeline(batch_size=batch_size, generator=generator, output_type="np", **kwargs).images
    )


class Interrupt(Exception):
    pass


def test_an_aborted_run_leaves_nothing_to_the_next(
    deployed: DeployedPipeline, tiny_artifact: Artifact
) -> None:
    expected = sample(deploy.load(tiny_artifact(CACHED)), seed=4, batch_size=3)
    denoiser, calls = deployed.denoiser, 0

    def stop_at_the_fifth(x: Tensor, step: int, cond: Any, feature: Tensor, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Interrupt
        return original(x, step, cond, feature, **kwargs)

    original = denoiser.cached
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "cached", stop_at_the_fifth)
        with pytest.raises(Interrupt):
            sample(deployed, seed=1)
    assert torch.equal(sample(deployed, seed=4, batch_size=3), expected)


def test_a_feature_serves_only_the_shape_and_type_that_it_was_made_from(deployed: DeployedPipeline) -> None:
    run = deployed.start()
    times = deployed.denoiser.timesteps
    run.pipe.unet(torch.randn(2, 1, 8, 8), times[0])
    with pytest.raises(
        ArtifactMismatchError, match=r"step 1 would read the cached feature of a sample .*2, 1, 8, 8"
    ):
        run.pipe.unet(torch.randn(2, 1, 16, 16), times[1])


def test_threads_do_not_touch_each_other(deployed: DeployedPipeline) -> None:
    seeds = (1, 2, 3)
    alone = [sample(deployed, seed=seed, batch_size=seed) for seed in seeds]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = sample(deployed, seed=seed, batch_size=seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], images) for seed, images in zip(seeds, alone, strict=True))


def test_a_clone_shares_weights_and_runs_beside(deployed: DeployedPipeline) -> None:
    clone = deployed.clone()
    own, other = (pipeline.pipe.unet.module for pipeline in (deployed, clone))
    assert own is not other
    pairs = zip(own.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(one.data_ptr() == two.data_ptr() for one, two in pairs)
    assert torch.equal(sample(clone, seed=3), sample(deployed, seed=3))
    assert clone.pipe.scheduler is not deployed.pipe.scheduler
    clone_denoiser = clone.denoiser
    with deployed.denoiser._context.at(0):  # type: ignore[attr-defined]  # an evaluation of the original
        done = threading.Thread(target=lambda: sample(clone, seed=3))
        done.start()
        done.join(timeout=20)
        assert not done.is_alive()
    assert clone_denoiser is not deployed.denoiser
    assert isinstance(wrap(clone, Plan(IEC())), object)


def test_hits_are_counted(deployed: DeployedPipeline) -> None:
    assert deployed.cache_info() == (0, 0)
    assert deployed.cache_info().hit_rate == 0
    sample(deployed)
    assert deployed.cache_info() == (4, 2)
    sample(deployed, batch_size=1)
    assert deployed.cache_info() == (8, 4)
    assert deployed.cache_info().hit_rate == pytest.approx(2 / 3)


def test_another_number_of_steps_takes_the_nearest_ranges_and_says_so(tiny_artifact: Artifact) -> None:
    path = tiny_artifact(CACHED)
    deployed = deploy.load(path, on_mismatch="nearest")
    with pytest.warns(UserWarning, match="sampling with 9 steps; 6 were recorded.*num_inference_steps=9"):
        images = sample(deployed, num_inference_steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(sample(deployed, num_inference_steps=9), images)
        assert torch.equal(sample(deployed), sample(deploy.load(path)))
        assert torch.equal(sample(deployed, num_inference_steps=6), sample(deploy.load(path)))
    mapped = deployed.at_steps(9)
    assert mapped.denoiser.timesteps == own_timesteps(9)
    assert mapped.schedule.num_steps == 9
    strict = deploy.load(path)
    with pytest.raises(ArtifactMismatchError, match="num_inference_steps=9, but 6 were recorded"):
        sample(strict, num_inference_steps=9)


def own_timesteps(count: int) -> tuple[float, ...]:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(count)
    return tuple(float(time) for time in scheduler.timesteps)


def test_a_mapped_call_is_told_its_own_time_with_recorded_ranges(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact("w8a8"), backend="reference", on_mismatch="nearest")
    with pytest.warns(UserWarning, match="at most"):
        mapped = deployed.at_steps(8)
    x = torch.randn(2, 1, 8, 8)
    times, recorded = own_timesteps(8), own_timesteps(6)
    denoiser: Any = deployed.denoiser
    for call, time in enumerate(times):
        nearest = min(range(6), key=lambda step: abs(recorded[step] - time))
        with torch.no_grad(), denoiser._context.at(nearest):
            expected, _ = denoiser.unet.full(x, time, {}, branch=0)
        assert torch.equal(mapped.denoiser.full(x, call, {})[0], expected)
        if time != recorded[nearest]:
            told_the_recorded_time, _ = deployed.denoiser.full(x, nearest, {})
            assert not torch.equal(told_the_recorded_time, expected)


def test_fused_biases_follow_the_time_and_not_the_step(tiny_artifact: Artifact) -> None:
    path = tiny_artifact("w8a8")
    used, fresh = (deploy.load(path, on_mismatch="nearest") for _ in range(2))
    x = torch.randn(1, 1, 8, 8)
    used.denoiser.full(x, 3, {})
    with pytest.warns(UserWarning, match="6 were recorded"):
        pairs = [pipeline.at_steps(8).denoiser.full(x, 4, {})[0] for pipeline in (used, fresh)]
    assert torch.equal(*pairs)


def test_corrections_work_on_mapped_steps_but_not_plans_of_the_recorded_ones(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact(CACHED), on_mismatch="nearest")
    with pytest.warns(UserWarning, match="6 were recorded"):
        mapped = deployed.at_steps(9)
    corrected = wrap(mapped, Plan(IEC()))
    assert not torch.equal(sample(corrected), sample(mapped))
    bound = Plan(IEC(), artifact=deployed.manifest.sha256)
    wrap(deployed, bound)
    with pytest.raises(PlanError, match="made for 6 sampling steps, but this pipeline takes 9"):
        wrap(mapped, bound)


def test_unknown_timesteps_are_not_guessed(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact("w8a8"), on_mismatch="nearest")
    deployed.pipe.scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    with pytest.raises(
        ArtifactMismatchError, match="the recorded timesteps are not those of DDIMScheduler at 6"
    ):
        sample(deployed, num_inference_steps=9)
    deployed = deploy.load(tiny_artifact("w8a8"), on_mismatch="nearest")
    with pytest.raises(ArtifactMismatchError, match="num_inference_steps=2000: .*choose another number"):
        sample(deployed, num_inference_steps=2000)


@pytest.mark.parametrize(
    ("ranges_of", "full"),
    [
        ((0, 1, 2, 3, 4, 5), (0, 3)),
        ((0, 0, 1, 2, 3, 3, 4, 5), (0, 4)),
        ((0, 3, 5), (0, 1)),
        ((2, 4), (0, 1)),
        ((4, 5), (0,)),
    ],
)
def test_the_feature_is_refreshed_once_in_each_recorded_interval(
    ranges_of: tuple[int, ...], full: tuple[int, ...]
) -> None:
    schedule = CacheSchedule.uniform(6, interval=3, branch=1)
    assert schedule_at(schedule, ranges_of).full_steps == full


def test_the_calls_of_a_step_stay_in_their_streams() -> None:
    recorded = (900.0, 900.0, 500.0, 500.0, 100.0, 100.0)
    times = (800.0, 800.0, 700.0, 700.0, 200.0, 200.0)
    assert nearest_steps(times, recorded, calls_per_step=2) == (0, 1, 0, 1, 4, 5)
    schedule = CacheSchedule.uniform(6, interval=2, branch=1, calls_per_step=2)
    assert schedule_at(schedule, (0, 1, 0, 1, 4, 5)).full_steps == (0, 1, 4, 5)
