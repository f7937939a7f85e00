"""Trajectory errors against closed forms and against the pipelines' own results."""

import copy
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Generator, Tensor

from errata import deploy
from errata.correct import IEC, Plan, wrap
from errata.correct.analysis import TrajectoryError, trajectory_error
from errata.correct.analysis.trajectories import UNCORRECTED
from errata.deploy import DeployedPipeline
from errata.errors import PlanError

Deploy = Callable[..., DeployedPipeline]
STEPS = 5
IEC_PLAN = {"IEC": Plan(IEC())}


def latents(indices: range) -> Mapping[str, Any]:
    draws = [torch.randn(1, 4, 4, dtype=torch.float64, generator=Generator().manual_seed(i)) for i in indices]
    return {"latents": torch.stack(draws)}


def compare(deployed: DeployedPipeline, reference: Any, **options: Any) -> TrajectoryError:
    chosen: dict[str, Any] = {"plans": {}, "samples": 3, "inputs": latents, **options}
    return trajectory_error(deployed, reference, **chosen)


def factors(scheduler: DDIMScheduler, slope: float) -> list[float]:
    """x_t / x_T along DDIM with ε = slope x."""
    scheduler.set_timesteps(STEPS)
    alphas = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps] + [1.0]
    found, x = [], 1.0
    for a, a_next in itertools.pairwise(alphas):
        ratio = math.sqrt(a_next / a)
        x *= ratio + slope * (math.sqrt(1 - a_next) - ratio * math.sqrt(1 - a))
        found.append(x)
    return found


def test_a_linear_network_drifts_by_the_ratio_of_its_steps(
    deploy_closed_form: Deploy, ddim: DDIMScheduler
) -> None:
    artifact = deploy_closed_form(lambda x, step: 0.9 * x, ddim, STEPS)
    reference = deploy_closed_form(lambda x, step: 0.5 * x, ddim, STEPS).pipe
    found = compare(artifact, reference, batch_size=2)
    here, there = factors(ddim, 0.9), factors(ddim, 0.5)
    relative = [abs(one - other) / abs(other) for one, other in zip(here, there, strict=True)]
    size = latents(range(3))["latents"].flatten(1).square().mean(1).sqrt()
    assert found.timesteps == artifact.denoiser.timesteps
    for i, row in enumerate(found.relative[UNCORRECTED].each):
        assert row == pytest.approx((relative[i],) * 3, rel=1e-5)
        assert found.rms[UNCORRECTED].each[i] == pytest.approx(
            (abs(here[i] - there[i]) * size).tolist(), rel=1e-5
        )
    assert min(relative) > 1e-3


def test_an_artifact_equal_to_the_float_model_does_not_drift(
    deploy_closed_form: Deploy, ddim: DDIMScheduler
) -> None:
    artifact = deploy_closed_form(lambda x, step: torch.sin(2 * x + step), ddim, STEPS)
    found = compare(artifact, artifact.pipe, plans=IEC_PLAN)
    assert max(found.relative[UNCORRECTED].high) == 0.0
    assert min(found.relative["IEC"].low) > 1e-3


@pytest.mark.parametrize("clip_sample", [False, True])
def test_plans_end_where_the_corrected_pipeline_ends(deploy_closed_form: Deploy, clip_sample: bool) -> None:
    # With clipping, IEC replaces the sample that the scheduler's step returned.
    scheduler = DDIMScheduler(clip_sample=clip_sample)
    artifact = deploy_closed_form(lambda x, step: torch.sin(2 * x + step), scheduler, STEPS)
    reference = deploy_closed_form(lambda x, step: torch.sin(1.9 * x + step), scheduler, STEPS)
    found = compare(artifact, reference.pipe, plans=IEC_PLAN)
    expected = reference(**latents(range(3))).flatten(1)
    ends: dict[str, Callable[..., Any]] = {UNCORRECTED: artifact, "IEC": wrap(artifact, IEC_PLAN["IEC"])}
    for name, pipeline in ends.items():
        result: Tensor = pipeline(**latents(range(3))).flatten(1)
        distance = (result - expected).norm(dim=1) / expected.norm(dim=1)
        assert found.relative[name].each[-1] == pytest.approx(distance.tolist(), rel=1e-9)
    assert abs(found.relative["IEC"].mean[-1] - found.relative[UNCORRECTED].mean[-1]) > 1e-3


def test_a_quantized_artifact_against_its_float_pipeline(
    tiny_artifact: Callable[[str], Path], tiny_pipeline: DDIMPipeline
) -> None:
    deployed = deploy.load(tiny_artifact("w8a8"), "cpu")
    before = dict(vars(tiny_pipeline.scheduler)), type(tiny_pipeline), dict(vars(tiny_pipeline))
    found = trajectory_error(deployed, tiny_pipeline, plans=IEC_PLAN, samples=2, seed=3)
    assert list(found.relative) == [UNCORRECTED, "IEC"]
    mean = found.relative[UNCORRECTED].mean
    assert all(1e-3 < error < 0.1 for error in mean)
    after = dict(vars(tiny_pipeline.scheduler)), type(tiny_pipeline), dict(vars(tiny_pipeline))
    assert all(after[0][name] is before[0][name] for name in before[0])
    assert after[1:] == before[1:]
    assert "step" not in vars(deployed.pipe.scheduler)


def test_a_sample_depends_on_its_index_alone(tiny_pipeline: DDIMPipeline, deploy_unet: Deploy) -> None:
    artifact = deploy_unet(
        DDIMScheduler(clip_sample=False), STEPS, pipeline=DDIMPipeline, dtype=torch.float32
    )
    other = DDIMScheduler(clip_sample=False, beta_end=0.03)  # the artifact's own is used
    reference = DDIMPipeline(unet=copy.deepcopy(tiny_pipeline.unet), scheduler=other)
    reference.unet.conv_out.bias.data += 0.1
    together = trajectory_error(artifact, reference, plans={}, samples=3, seed=3).relative[UNCORRECTED]
    alone = trajectory_error(artifact, reference, plans={}, samples=3, batch_size=1, seed=3)
    later = trajectory_error(artifact, reference, plans={}, samples=1, seed=5).relative[UNCORRECTED]
    for row, same, last in zip(together.each, alone.relative[UNCORRECTED].each, later.each, strict=True):
        assert row == pytest.approx(same, rel=1e-3)
        assert row[2] == pytest.approx(last[0], rel=1e-3)
        assert max(row) > 1.02 * min(row)


def test_other_noise_is_refused(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> None:
    drawn = iter(range(10))
    artifact = deploy_closed_form(lambda x, step: 0.9 * x, ddim, STEPS)
    with pytest.raises(PlanError, match="start from different noise"):
        compare(artifact, artifact.pipe, inputs=lambda rows: latents(range(next(drawn), 10)))


def test_the_reference_is_a_float_pipeline(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> None:
    artifact = deploy_closed_form(lambda x, step: 0.9 * x, ddim, STEPS)
    with pytest.raises(PlanError, match="pass the float diffusers pipeline"):
        compare(artifact, artifact)


def test_the_name_of_no_plan_is_taken(deploy_closed_form: Deploy, ddim: DDIMScheduler) -> None:
    artifact = deploy_closed_form(lambda x, step: 0.9 * x, ddim, STEPS)
    with pytest.raises(PlanError, match="give that plan another name"):
        compare(artifact, artifact.pipe, plans={UNCORRECTED: Plan(IEC())})


def test_json_and_plot(deploy_closed_form: Deploy, ddim: DDIMScheduler, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    artifact = deploy_closed_form(lambda x, step: 0.9 * x, ddim, STEPS)
    reference = deploy_closed_form(lambda x, step: 0.5 * x, ddim, STEPS).pipe
    found = compare(artifact, reference, plans=IEC_PLAN)
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["relative"]["IEC"] == found.relative["IEC"].to_json()
    assert value["timesteps"] == list(found.timesteps)
    assert found.plot(tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
