import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves

from errata.correct import IEC, Plan, RunStats, StepStats, overhead, wrap
from errata.correct.stats import StepRecord
from errata.deploy import DeployedPipeline
from errata.runtime.schedule import CacheSchedule

Deploy = Callable[..., DeployedPipeline]
CACHED = CacheSchedule.uniform(6, interval=3, branch=1)


def network(x: Tensor, step: int) -> Tensor:
    return torch.sin(2 * x + step)


def latents(batch_size: int) -> Tensor:
    return torch.randn(batch_size, 1, 4, 4, generator=Generator().manual_seed(5))


@pytest.fixture
def deployed(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> DeployedPipeline:
    return deploy_closed_form(network, ddim, 6, schedule=CACHED, costs={"full": 3.0, "cached": 0.75})


@pytest.mark.parametrize(
    ("iterations", "expression", "expected"),
    [
        (1, "full", 2 * 3.0 / (2 * 3.0 + 4 * 0.75)),
        (3, "full", 6 * 3.0 / (2 * 3.0 + 4 * 0.75)),
        (1, "first:1", 3.0 / 9.0),
        (1, "none", 0.0),
    ],
)
def test_overhead_weighs_each_kind_by_its_cost(
    deployed: DeployedPipeline, iterations: int, expression: str, expected: float
) -> None:
    corrected = wrap(deployed, Plan(IEC(iterations=iterations, tolerance=0.0), expression))
    corrected(latents=latents(3))
    assert corrected.overhead() == pytest.approx(expected)
    assert overhead(corrected.stats, deployed.denoiser) == corrected.overhead()


def test_an_artifact_without_a_cache_is_never_asked_for_its_cached_cost(
    deploy_closed_form: Deploy, ddim: DDIMScheduler
) -> None:
    corrected = wrap(deploy_closed_form(network, ddim, 6, costs={"full": 2.0}), Plan(IEC(), "ends:1/6"))
    corrected(latents=latents(2))
    assert corrected.overhead() == pytest.approx(2 / 6)


def test_costs_are_those_of_the_run_s_batch_size(deploy_unet: Deploy, ddim: DDIMScheduler) -> None:
    deployed = deploy_unet(
        ddim, 3, schedule=CacheSchedule.uniform(3, interval=2, branch=1), dtype=torch.float32
    )
    corrected = wrap(deployed, Plan(IEC()))
    corrected(latents=torch.randn(4, 1, 8, 8))
    full = deployed.denoiser.cost("full", batch_size=4)
    cached = deployed.denoiser.cost("cached", batch_size=4)
    assert corrected.overhead() == pytest.approx(2 * full / (2 * full + cached))


def test_every_step_is_told(deployed: DeployedPipeline) -> None:
    corrected = wrap(deployed, Plan(IEC(iterations=2, tolerance=0.0), "3"))
    corrected(latents=latents(3))
    stats = corrected.stats
    assert stats.batch_size == 3
    assert [step.step for step in stats.steps] == list(range(6))
    assert [step.kind for step in stats.steps] == ["full", "cached", "cached"] * 2
    assert [step.extra for step in stats.steps] == [{}, {}, {}, {"full": 2.0}, {}, {}]
    assert [step.iterations for step in stats.steps] == [(), (), (), (2, 2, 2), (), ()]
    assert [len(each) for each in stats.steps[3].residuals] == [2, 2, 2]
    assert stats.steps[3].evaluations == {"full": 3.0}
    assert stats.steps[4].evaluations == {"cached": 1.0}
    assert stats.base == {"full": 2.0, "cached": 4.0}
    assert stats.extra == {"full": 2.0}
    assert stats.evaluations == {"full": 4.0, "cached": 4.0}
    assert stats.iterations == (2, 2, 2)


def test_they_agree_with_what_the_denoiser_was_asked(deployed: DeployedPipeline) -> None:
    """Some samples stop early, so that batches shrink."""
    corrected = wrap(deployed, Plan(IEC(step_size=0.3, iterations=4, tolerance=0.7)))
    corrected(latents=latents(8))
    asked = {"full": 0.0, "cached": 0.0}
    for kind, batch_size in deployed.denoiser.calls:  # type: ignore[attr-defined]
        asked[kind] += batch_size / 8
    assert corrected.stats.evaluations == asked
    assert len({iterations for step in corrected.stats.steps for iterations in step.iterations}) > 1


def test_they_are_those_of_the_latest_call(deployed: DeployedPipeline) -> None:
    corrected = wrap(deployed, Plan(IEC()))
    corrected(latents=latents(3))
    first = corrected.stats
    corrected(latents=latents(2))
    assert (first.batch_size, corrected.stats.batch_size) == (3, 2)


def test_no_corrected_step() -> None:
    stats = RunStats(batch_size=2, steps=(StepStats(step=0, kind="full"),))
    assert stats.iterations == ()
    assert stats.extra == {}


def test_a_record_keeps_numbers_and_no_batch_of_samples(
    deploy_unet: Deploy, ddim: DDIMScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator the records of all steps wait for the end of the run."""
    kept: list[int] = []

    plain = StepRecord.of

    def recording(*args: Any, **options: Any) -> StepRecord:
        record = plain(*args, **options)
        fields = {item.name: getattr(record, item.name) for item in dataclasses.fields(StepRecord)}
        tensors = [fields["is_finite"], *fields["diverged"], *fields["notes"].values()]
        tensors += [values for _, values in fields["residuals"]]
        kept.extend(tensor.numel() for tensor in tensors)
        # No other field holds a tensor.
        assert {name for name, value in fields.items() if _tensors(value)} <= {
            *("is_finite", "diverged", "notes", "residuals")
        }
        return record

    monkeypatch.setattr(StepRecord, "of", recording)
    schedule = CacheSchedule.uniform(4, interval=2, branch=1)
    corrected = wrap(deploy_unet(ddim, 4, schedule=schedule), Plan(IEC(iterations=2, guard=False)))
    corrected(latents=torch.randn(3, 1, 8, 8, dtype=torch.float64))
    assert kept
    assert max(kept) <= 3


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
