from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from errata.calibration.calibration_set import Record
from errata.compress.cache.cache_features import RefinedInputs, input_scales
from errata.errors import RecipeError

# diffusers 0.42 and numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SCALING = ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
           "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "EDMEulerScheduler"]  # fmt: skip
PLAIN = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"]


def recorded_by(name: str, *, steps: int = 5, channels: int = 4, **changes: Any) -> Any:
    """What a calibration set says of a run with that scheduler."""
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(steps)
    said = {
        "scheduler_class": name,
        "scheduler_config": dict(scheduler.config),
        "num_inference_steps": steps,
        "timesteps": tuple(float(time) for time in scheduler.timesteps),
        "sample_shape": (channels, 4, 4),
        "calls_per_step": 1,
    }
    return SimpleNamespace(**said | changes)


def unet(*, out_channels: int = 4) -> Any:
    return SimpleNamespace(config=SimpleNamespace(out_channels=out_channels))


def record(sample: Tensor, step: int) -> Record:
    return Record(sample=sample, timestep=torch.tensor(1), cond={"c": torch.ones(1)}, step=step)


def run_of(name: str, steps: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    """Latents and network inputs at every call of a run whose network predicts random noise."""
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(steps)
    latents, inputs = [], []
    sample = torch.randn(2, 4, 4, 4)
    for time in scheduler.timesteps:
        latents.append(sample)
        inputs.append(scheduler.scale_model_input(sample, time))
        sample = scheduler.step(torch.randn(2, 4, 4, 4), time, sample).prev_sample
    return latents, inputs


@pytest.mark.parametrize("name", PLAIN)
def test_a_scheduler_that_scales_nothing(name: str) -> None:
    said = recorded_by(name)
    assert input_scales(said) == (1.0,) * len(said.timesteps)
    refined = RefinedInputs(unet(), said)
    full, following = record(torch.randn(1, 4, 4, 4), 0), record(torch.randn(1, 4, 4, 4), 1)
    found = refined.at(full, following)
    assert found.sample is following.sample
    assert (found.step, found.timestep, found.cond) == (0, full.timestep, full.cond)


@pytest.mark.parametrize("name", SCALING)
def test_the_next_recorded_input_is_given_the_scaling_of_the_full_step(name: str) -> None:
    latents, inputs = run_of(name)
    said = recorded_by(name)
    assert len(latents) == len(said.timesteps)
    scales = input_scales(said)
    assert max(scales) / min(scales) > 2
    refined = RefinedInputs(unet(), said)
    for step in range(len(latents) - 1):
        found = refined.at(record(inputs[step], step), record(inputs[step + 1], step + 1))
        torch.testing.assert_close(found.sample, scales[step] * latents[step + 1], rtol=1e-5, atol=1e-5)


def test_euler_scales_by_its_sigmas() -> None:
    said = recorded_by("EulerDiscreteScheduler")
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    expected = [1 / (float(sigma) ** 2 + 1) ** 0.5 for sigma in scheduler.sigmas[:-1]]
    assert input_scales(said) == pytest.approx(expected, rel=1e-5)


def test_noise_of_an_ancestral_scheduler_leaves_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    input_scales(recorded_by("EulerAncestralDiscreteScheduler"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_concatenated_condition_is_not_scaled() -> None:
    refined = RefinedInputs(unet(), recorded_by("EulerDiscreteScheduler", channels=9))
    condition = torch.randn(2, 5, 4, 4)
    now, following = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    found = refined.at(
        record(torch.cat([now, condition], 1), 0), record(torch.cat([following, condition], 1), 1)
    )
    ratio = found.sample[:, :4] / following
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
    assert ratio.mean() < 0.7
    assert torch.equal(found.sample[:, 4:], condition)


def test_a_network_that_predicts_a_variance_too_has_only_latent_channels() -> None:
    refined = RefinedInputs(unet(out_channels=8), recorded_by("EulerDiscreteScheduler"))
    found = refined.at(record(torch.ones(1, 4, 4, 4), 0), record(torch.ones(1, 4, 4, 4), 1))
    assert found.sample.unique().numel() == 1


def test_a_condition_that_changes_is_refused_where_inputs_are_scaled() -> None:
    full, following = record(torch.randn(1, 9, 4, 4), 0), record(torch.randn(1, 9, 4, 4), 1)
    RefinedInputs(unet(), recorded_by("DDIMScheduler", channels=9)).at(full, following)
    refined = RefinedInputs(unet(), recorded_by("EulerDiscreteScheduler", channels=9))
    with pytest.raises(RecipeError, match="input channels 4 to 8 change between steps 0 and 1.*leave corr"):
        refined.at(full, following)


def test_other_timesteps_are_refused_only_where_inputs_are_scaled() -> None:
    assert input_scales(recorded_by("DDIMScheduler", timesteps=(5.0, 3.0))) == (1.0, 1.0)
    with pytest.raises(RecipeError, match="EulerDiscreteScheduler scales its inputs.*not the recorded ones"):
        input_scales(recorded_by("EulerDiscreteScheduler", timesteps=(5.0, 3.0)))


def test_a_scheduler_that_cannot_be_run_is_refused() -> None:
    with pytest.raises(RecipeError, match="input scaling of DreamScheduler cannot be determined.*leave"):
        input_scales(recorded_by("DDIMScheduler", scheduler_class="DreamScheduler"))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
def test_the_calls_of_a_sampler_step_are_scaled_alike(name: str) -> None:
    one = recorded_by(name)
    times = tuple(time for time in one.timesteps for _ in range(2))
    scales = input_scales(recorded_by(name, timesteps=times, calls_per_step=2))
    assert scales[::2] == scales[1::2] == input_scales(one)
    refined = RefinedInputs(unet(), recorded_by(name, timesteps=times, calls_per_step=2))
    full, following = (record(torch.randn(2, 4, 4, 4), step) for step in (3, 5))
    expected = following.sample * (scales[3] / scales[5])
    torch.testing.assert_close(refined.at(full, following).sample, expected)
    if name in SCALING:
        with pytest.raises(RecipeError, match="its timesteps are not the recorded ones"):
            input_scales(recorded_by(name, timesteps=times))
