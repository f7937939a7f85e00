"""`attach`: the diffusers pipeline of an artifact samples corrected, until it is detached."""

import copy
import gc
import inspect
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Generator

from errata import deploy
from errata.compress import CompressedPipeline
from errata.correct import IEC, Forecast, Plan, attach, wrap
from errata.deploy import DeployedPipeline
from errata.errors import ArtifactMismatchError, PlanError
from errata.runtime.schedule import CacheSchedule

Deploy = Callable[..., DeployedPipeline]
STEPS = 6
PLAN = Plan(IEC(), "full") + Plan(Forecast(order=1))


@pytest.fixture
def deployed(deploy_unet: Deploy) -> DeployedPipeline:
    schedule = CacheSchedule.uniform(STEPS, interval=3, branch=1)
    scheduler = DDIMScheduler(clip_sample=False)
    return deploy_unet(scheduler, STEPS, schedule=schedule, pipeline=DDIMPipeline, dtype=torch.float32)


def images(pipeline: Callable[..., Any], **options: Any) -> Any:
    return pipeline(batch_size=2, generator=Generator().manual_seed(2), output_type="np", **options).images


def test_it_samples_as_the_wrapped_artifact_does(deployed: DeployedPipeline) -> None:
    corrected = wrap(deployed, PLAN)
    expected, plain = images(corrected), images(deployed)
    full = images(deployed.pipe, num_inference_steps=STEPS)  # without a cache
    with attach(deployed.pipe, PLAN) as attachment:
        found = images(deployed.pipe)
        assert (images(deployed.pipe, num_inference_steps=STEPS) == expected).all()
    assert (found == expected).all()
    assert min(abs(found - other).max() for other in (plain, full)) > 1e-3
    assert attachment.steps == corrected.steps == (0, 3, 4, 5)
    assert attachment.stats == corrected.stats
    assert attachment.overhead() == corrected.overhead() > 0


def test_what_is_attached_to_is_the_pipeline_alone(deployed: DeployedPipeline) -> None:
    plain, wrapped = images(deployed), images(wrap(deployed, Plan(IEC(iterations=2), "0")))
    direct = images(deployed.pipe, num_inference_steps=STEPS)
    with attach(deployed, PLAN):
        assert (images(deployed) == plain).all()
        assert (images(wrap(deployed, Plan(IEC(iterations=2), "0"))) == wrapped).all()
        pickled = pickle.loads(pickle.dumps(deployed.pipe))
        for copied in (copy.copy(deployed.pipe), copy.deepcopy(deployed.pipe), pickled):
            assert type(copied) is DDIMPipeline
            assert (images(copied, num_inference_steps=STEPS) == direct).all()
    assert (images(deployed.pipe, num_inference_steps=STEPS) == direct).all()


def test_nobody_else_sees_a_difference(deployed: DeployedPipeline) -> None:
    pipe = deployed.pipe
    signature, state = inspect.signature(pipe.__call__), dict(vars(pipe))
    attachment = attach(pipe, PLAN)
    kind = type(pipe)
    assert isinstance(pipe, DDIMPipeline)
    assert (kind.__name__, kind.__module__, kind.__doc__) == (
        DDIMPipeline.__name__,
        DDIMPipeline.__module__,
        DDIMPipeline.__doc__,
    )
    assert inspect.signature(pipe.__call__) == signature
    assert vars(pipe) == state
    assert pipe.components.keys() == {"unet", "scheduler"}
    images(pipe)
    assert vars(pipe) == state
    attachment.detach()
    assert type(pipe) is DDIMPipeline
    assert vars(pipe) == state


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(
    deployed: DeployedPipeline, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    attachment = attach(deployed.pipe, PLAN)
    expected = images(deployed.pipe)
    stats = attachment.stats

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise error("stop")

    with monkeypatch.context() as patch:
        patch.setattr(deployed.denoiser, "cached", failing)
        with pytest.raises(error, match="stop"):
            images(deployed.pipe)
        assert attachment.stats is stats
    assert (images(deployed.pipe) == expected).all()
    attachment.detach()
    with pytest.raises(error, match="stop"), attach(deployed.pipe, PLAN):
        raise error("stop")
    assert type(deployed.pipe) is DDIMPipeline


def test_whatever_else_is_done_to_it_has_its_effect(deployed: DeployedPipeline) -> None:
    with attach(deployed.pipe, PLAN):
        expected = images(deployed.pipe)
        deployed.pipe.scheduler = DDIMScheduler(clip_sample=True)
        assert (images(deployed.pipe) != expected).any()
        with pytest.raises(ArtifactMismatchError, match="num_inference_steps=7, but 6 were recorded"):
            images(deployed.pipe, num_inference_steps=7)


def test_one_at_a_time(deployed: DeployedPipeline) -> None:
    first = attach(deployed.pipe, PLAN)
    for again in (deployed, deployed.pipe):
        with pytest.raises(PlanError, match="already corrected.*detach the first one, or join the plans"):
            attach(again, Plan(IEC(), "0"))
    first.detach()
    first.detach()
    second = attach(deployed.pipe, Plan(IEC(), "0"))
    first.detach()  # it is not its own any more
    images(deployed.pipe)
    assert second.stats.extra == {"full": 1.0}
    second.detach()
    assert type(deployed.pipe) is DDIMPipeline


def test_stats_before_a_call(deployed: DeployedPipeline) -> None:
    attachment = attach(deployed, PLAN)
    for read in (lambda: attachment.stats, attachment.overhead):
        with pytest.raises(PlanError, match="nothing was sampled yet"):
            read()


def test_the_pipeline_is_enough(tiny_artifact: Callable[[str], Path]) -> None:
    """Nobody need hold the artifact; what it says of itself still counts."""
    deployed = deploy.load(tiny_artifact("w8a8+deepcache-3"))
    deployed.pipe.set_progress_bar_config(disable=True)
    digest, pipe = deployed.manifest.sha256, deployed.pipe
    expected, report = images(wrap(deployed, PLAN)), deployed.backend_report()
    del deployed
    gc.collect()
    with attach(pipe, replace(PLAN, artifact=digest)):
        assert (images(pipe) == expected).all()
    known = DeployedPipeline.of(pipe)
    assert known is not None
    assert (known.manifest.sha256, known.backend_report()) == (digest, report)
    with pytest.raises(PlanError, match="this plan was made for the artifact 000000000000…"):
        attach(pipe, replace(PLAN, artifact=64 * "0"))


def test_batch_invariance_is_handed_on(deployed: DeployedPipeline) -> None:
    expected = images(wrap(deployed, PLAN, batch_invariant=True))
    assert (expected != images(wrap(deployed, PLAN))).any()
    with attach(deployed, PLAN, batch_invariant=True):
        assert (images(deployed.pipe) == expected).all()


# Refusals.


def test_pipelines_of_no_artifact_are_refused(
    tiny_pipeline: DDIMPipeline, tiny_compressed: Callable[[str], CompressedPipeline]
) -> None:
    with pytest.raises(TypeError, match="not a float DDIMPipeline: compress it, export it and load it"):
        attach(tiny_pipeline, PLAN)
    compressed: Any = tiny_compressed("deepcache-3")
    for given in (compressed, compressed.pipe):
        with pytest.raises(
            TypeError, match="Pipeline belongs to none: freeze it first, and pass deploy.load"
        ):
            attach(given, PLAN)


def test_a_pipeline_made_of_an_artifact_s_parts_is_refused(deployed: DeployedPipeline) -> None:
    other = DDIMPipeline(**deployed.pipe.components)
    with pytest.raises(TypeError, match="this DDIMPipeline belongs to none"):
        attach(other, PLAN)


def test_an_artifact_s_pipeline_with_another_network_is_refused(
    deployed: DeployedPipeline, tiny_pipeline: DDIMPipeline
) -> None:
    deployed.pipe.unet = tiny_pipeline.unet
    with pytest.raises(TypeError, match="not a float DDIMPipeline"):
        attach(deployed.pipe, PLAN)


@pytest.mark.parametrize("given", ["runs/artifact", None])
def test_anything_else_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"pass deploy.load\(path\).pipe"):
        attach(given, PLAN)
