"""An image does not depend on its neighbours: no decision does, and with `batch_invariant` no bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from errata.correct import IEC, Forecast, Lookahead, Plan, SecondOrder, wrap
from errata.deploy import DeployedPipeline

Build = Callable[[str], Any]
Artifact = Callable[[str], DeployedPipeline]
# A tolerance, for each, at which two samples take different numbers of iterations.
STOPPING = {"ldm labels vq": 3.2, "ldm labels split": 3.2, "sd 2": 0.14, "sdxl": 6.57}
PLANS = {
    "iec": Plan(IEC(), "full"),
    "forecast": Plan(Forecast(order=1)),
    "lookahead": Plan(Lookahead()),
    "joined": Plan(SecondOrder()) + Plan(Forecast(order=1)),
}
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42, NumPy 2


def images(small: Any, run: Callable[..., Any], row: int | None = None) -> Tensor:
    """Both samples, or one of them alone; decoded."""
    rows = range(2) if row is None else [row]
    inputs = {name: part(value, row) for name, value in small.inputs.items()}
    seeds = [Generator().manual_seed(index) for index in rows]
    drawn = getattr(run(generator=seeds, output_type="np", **inputs), small.output)
    return torch.as_tensor(drawn).float()


def part(value: Any, row: int | None) -> Any:
    """One sample's share of an argument."""
    if row is None or not isinstance(value, list | Tensor):
        return value
    return value[row : row + 1]


def compare(small: Any, deployed: DeployedPipeline, plan: Plan, *, batch_invariant: bool) -> float:
    """Largest distance of an image alone to the same in a batch; decisions are compared on the way."""
    corrected = wrap(deployed, plan, batch_invariant=batch_invariant)
    both, stats, alone = images(small, corrected), corrected.stats, []
    for row in range(2):
        alone.append(images(small, corrected, row))
        for one, many in zip(corrected.stats.steps, stats.steps, strict=True):
            assert one.iterations == many.iterations[row : row + 1]
            if batch_invariant:
                assert one.residuals == many.residuals[row : row + 1]
    return float((torch.cat(alone) - both).abs().max())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", STOPPING)
def test_alone_and_in_a_batch(name: str, plan: Plan, small_pipeline: Build, small_artifact: Artifact) -> None:
    """The text encoder and the decoder count too; without the mechanism the last bits differ."""
    small, deployed = small_pipeline(name), small_artifact(name)
    assert compare(small, deployed, plan, batch_invariant=True) == 0.0
    assert 0.0 < compare(small, deployed, plan, batch_invariant=False) < 1e-4


@pytest.mark.parametrize("name", STOPPING)
def test_a_sample_that_stops_early(name: str, small_pipeline: Build, small_artifact: Artifact) -> None:
    small, deployed = small_pipeline(name), small_artifact(name)
    plan = Plan(IEC(iterations=3, tolerance=STOPPING[name]), "full")
    for batch_invariant in (True, False):
        moved = compare(small, deployed, plan, batch_invariant=batch_invariant)
        assert (moved == 0.0) is batch_invariant
        assert moved < 1e-4
    corrected = wrap(deployed, plan)
    images(small, corrected)
    assert any(len(set(step.iterations)) == 2 for step in corrected.stats.steps), [
        step.residuals for step in corrected.stats.steps if step.residuals
    ]


@pytest.mark.parametrize("name", ["ldm labels vq", "sd 2", "sdxl"])
def test_the_pipeline_s_own_parts_stay_as_they_are(
    name: str, small_pipeline: Build, small_artifact: Artifact
) -> None:
    small, deployed = small_pipeline(name), small_artifact(name)
    before = images(small, deployed)
    parts = {key: (id(value), dict(vars(value))) for key, value in deployed.pipe.components.items() if value}
    wrapped = wrap(deployed, PLANS["iec"], batch_invariant=True)
    images(small, wrapped)
    for key, (identity, state) in parts.items():
        assert id(deployed.pipe.components[key]) == identity
        assert vars(deployed.pipe.components[key]).keys() == state.keys()
    assert torch.equal(images(small, deployed), before)
