"""A corrected pipeline is called as its diffusers pipeline is, interrupted, shared, and used from threads."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Generator

from errata import deploy
from errata.correct import IEC, CorrectedPipeline, Forecast, Lookahead, Plan, wrap
from errata.correct.batch_invariance import BatchInvariantDenoiser
from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule

Deploy = Callable[..., DeployedPipeline]
STEPS = 6
PLAN = Plan(IEC(), "full") + Plan(Forecast(order=1))


@pytest.fixture
def deployed(deploy_unet: Deploy) -> DeployedPipeline:
    schedule = CacheSchedule.uniform(STEPS, interval=3, branch=1)
    scheduler = DDIMScheduler(clip_sample=False)
    return deploy_unet(scheduler, STEPS, schedule=schedule, pipeline=DDIMPipeline, dtype=torch.float32)


@pytest.fixture
def corrected(deployed: DeployedPipeline) -> CorrectedPipeline:
    return wrap(deployed, PLAN)


def seeds(*values: int) -> list[Generator]:
    return [Generator().manual_seed(value) for value in values]


def images(pipeline: Callable[..., Any], *values: int, **options: Any) -> Any:
    """One for each seed."""
    drawn = pipeline(batch_size=len(values), generator=seeds(*values), output_type="np", **options)
    return drawn.images


# The arguments and the result of the diffusers pipeline.


def test_positional_arguments(corrected: CorrectedPipeline) -> None:
    """`batch_size, generator, eta`, as in `DDIMPipeline.__call__`."""
    expected = images(corrected, 1, 2, eta=0.5)
    assert (corrected(2, seeds(1, 2), 0.5, output_type="np").images == expected).all()
    assert (images(corrected, 1, 2) != expected).any()
    with pytest.raises(TypeError, match="multiple values for argument 'batch_size'"):
        corrected(2, batch_size=2)


def test_one_generator_or_one_for_each_image(corrected: CorrectedPipeline) -> None:
    one = corrected(batch_size=2, generator=seeds(1)[0], output_type="np").images
    first = corrected(batch_size=1, generator=seeds(1)[0], output_type="np").images
    each = images(corrected, 1, 1)
    assert abs(each[0] - each[1]).max() == 0
    assert abs(one[0] - one[1]).max() > 1e-2
    np.testing.assert_allclose(first[0], each[0], rtol=0, atol=1e-5)


def test_kinds_of_output(corrected: CorrectedPipeline) -> None:
    expected = images(corrected, 1, 2)
    found = corrected(batch_size=2, generator=seeds(1, 2), return_dict=False)
    assert isinstance(found, tuple)
    (pictures,) = found
    assert [type(picture).__name__ for picture in pictures] == ["Image", "Image"]
    rounded = [np.asarray(picture) for picture in pictures]
    np.testing.assert_array_equal(rounded, (expected[..., 0] * 255).round().astype("uint8"))


def test_the_progress_bar_is_the_pipeline_s(
    corrected: CorrectedPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = corrected.pipe
    images(corrected, 1)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="drawing")
    images(corrected, 1)
    assert f"{STEPS}/{STEPS}" in (shown := capsys.readouterr().err)
    assert "drawing" in shown
    assert pipe._progress_bar_config == {"disable": False, "desc": "drawing"}


# Interrupts.


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [0, 1, 2, 5, 7])
def test_a_run_that_is_broken_off_leaves_nothing_behind(
    corrected: CorrectedPipeline,
    error: type[BaseException],
    call: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a plain call or in an extra one, inside the network: the layer that was reached is irrelevant."""
    deployed = corrected.deployed
    expected, plain = images(corrected, 1, 2, eta=0.5), images(deployed, 1, 2)
    network, scheduler = deployed.pipe.unet, deployed.pipe.scheduler
    calls = iter(range(100))
    layer: Any = deployed.denoiser.unet.unet.conv_out  # type: ignore[attr-defined]

    def failing(*args: Any) -> None:
        if next(calls) == call:
            raise error("stop")

    handle = layer.register_forward_hook(failing)
    with pytest.raises(error, match="stop"):
        images(corrected, 1, 2, eta=0.5)
    handle.remove()
    assert next(calls) == call + 1
    assert (deployed.pipe.unet, deployed.pipe.scheduler) == (network, scheduler)
    assert "step" not in vars(scheduler)
    assert (images(corrected, 1, 2, eta=0.5) == expected).all()
    assert (images(deployed, 1, 2) == plain).all()


# Several at once.


def test_runs_that_take_turns_do_not_meet(deployed: DeployedPipeline) -> None:
    """Another run starts and ends inside every denoiser call of the first."""
    one, other = wrap(deployed, PLAN), wrap(deployed, Plan(Lookahead()) + Plan(IEC(iterations=2), "0"))
    expected = images(one, 1, 2), images(other, 3)
    assert abs(images(other, 1, 2) - expected[0]).max() > 1e-3
    inner: list[Any] = []
    denoiser: Any = deployed.denoiser
    kept = denoiser.full

    def interleaved(*args: Any) -> Any:
        denoiser.full = kept
        inner.append(images(other, 3))
        denoiser.full = interleaved
        return kept(*args)

    denoiser.full = interleaved
    found = images(one, 1, 2)
    assert (found == expected[0]).all()
    assert len(inner) == 4  # two full steps, each refined once
    assert all((each == expected[1]).all() for each in inner)


@pytest.fixture
def _threads_switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_threads_switch_often")
def test_threads_take_turns(tiny_artifact: Callable[[str], Path]) -> None:
    """Layers of a quantized network read the step from a clock that all runs of an artifact share."""
    deployed = deploy.load(tiny_artifact("w8a8+deepcache-3"))
    deployed.pipe.set_progress_bar_config(disable=True)
    plans = (PLAN, Plan(Lookahead()) + Plan(IEC(iterations=2), "0"), Plan.none())
    pipelines = [wrap(deployed, plan) for plan in plans]
    expected = [images(pipeline, 1, 2) for pipeline in pipelines]
    assert abs(expected[0] - expected[1]).max() > 1e-3
    start, found = threading.Barrier(len(plans)), dict[int, list[Any]]()

    def draw(index: int) -> None:
        start.wait()
        found[index] = [images(pipelines[index], 1, 2) for _ in range(4)]

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(len(plans)))  # else an exception ended a thread
    for index, drawn in found.items():
        assert all((each == expected[index]).all() for each in drawn)
        assert pipelines[index].stats.extra == wrap_stats(plans[index])


def wrap_stats(plan: Plan) -> dict[str, float]:
    full = {IEC: 2.0, Lookahead: 4.0, type(None): 0.0}[type(plan.method)]
    return {"full": full} if full else {}


# Batches.


@pytest.mark.parametrize(
    "plan",
    [
        Plan(IEC(), "full"),
        Plan(IEC(iterations=3, tolerance=4.5), "full"),
        Plan(Forecast(order=1)),
        Plan(Lookahead()),
    ],
    ids=["iec", "iec that stops", "forecast", "lookahead"],
)
def test_an_image_is_the_same_alone_and_in_a_batch(deployed: DeployedPipeline, plan: Plan) -> None:
    numbers = (3, 1, 4, 15, 9)
    differs = {}
    for batch_invariant in (True, False):
        corrected = wrap(deployed, plan, batch_invariant=batch_invariant)
        batch, stats = images(corrected, *numbers), corrected.stats
        differs[batch_invariant] = False
        for index, number in enumerate(numbers):
            alone = images(corrected, number)
            np.testing.assert_allclose(alone[0], batch[index], rtol=0, atol=1e-4)
            differs[batch_invariant] |= bool((alone[0] != batch[index]).any())
            for one, many in zip(corrected.stats.steps, stats.steps, strict=True):
                assert one.iterations == many.iterations[index : index + 1]
    assert differs == {True: False, False: True}
    if isinstance(plan.method, IEC) and plan.method.iterations > 1:
        assert len(set(stats.iterations)) > 1, stats.iterations


def test_costs_of_small_calls_add_up(deployed: DeployedPipeline) -> None:
    corrected = wrap(deployed, Plan(IEC(), "full"), batch_invariant=True)
    images(corrected, 1, 2, 3)
    cost = deployed.denoiser.cost
    of_one = {kind: cost(kind, batch_size=1) for kind in ("full", "cached")}
    assert corrected.overhead() == pytest.approx(
        2 * of_one["full"] / (2 * of_one["full"] + 4 * of_one["cached"])
    )
    assert BatchInvariantDenoiser(deployed.denoiser).cost("cached", batch_size=3) == 3 * of_one["cached"]
