import pytest
import torch
from diffusers import DDIMPipeline

from errata.correct import IEC, Plan, amplification
from errata.correct.sampling import default_inputs
from errata.deploy import DeployedPipeline
from errata.report.growth import (
    AMPLIFIED,
    SAMPLES,
    amplification_plot,
    amplified_at,
    growth_of,
    growth_plot,
)

PLANS = {"none": Plan.none(), "all": Plan(IEC(), "all")}


def test_there_is_nothing_to_compare_without_a_float_model(deployed: DeployedPipeline) -> None:
    assert growth_of({"tiny": deployed}, None, {"tiny": PLANS}, seed=0, inputs=default_inputs) == {}
    assert amplified_at({}) is None


def test_errors_are_those_of_each_correcting_plan(
    deployed: DeployedPipeline, tiny_pipeline: DDIMPipeline
) -> None:
    (grown,) = growth_of(
        {"tiny": deployed}, tiny_pipeline, {"tiny": PLANS}, seed=0, inputs=default_inputs
    ).values()
    assert set(grown) == {"timesteps", "relative", "samples"}
    assert grown["samples"] == SAMPLES
    assert set(grown["relative"]) == {"uncorrected", "all"}
    assert all(len(errors) == 4 and min(errors) > 0 for errors in grown["relative"].values())
    assert "uncorrected" in growth_plot("tiny", grown)


def test_amplification_is_measured_where_it_is_asked_for(deployed: DeployedPipeline) -> None:
    growth = growth_of(
        {"tiny": deployed},
        None,
        {"tiny": PLANS},
        seed=3,
        inputs=default_inputs,
        amplification_steps="0,2",
    )
    assert amplified_at(growth) == "0,2"
    measured = growth["tiny"]["amplification"]
    assert IEC().step_size == 0.5
    torch.manual_seed(1)  # it depends on its own seed alone
    expected = amplification(deployed, step_sizes=(0.5,), steps="0,2", samples=AMPLIFIED, seed=3)
    assert measured["steps"] == [0, 2]
    assert measured["jacobian"] == pytest.approx(expected.propagation.mean)
    assert measured["iteration"] == pytest.approx(expected.refinement[0.5].mean)
    assert "λ = 0.5" in amplification_plot("tiny", measured)
