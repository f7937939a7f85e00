"""Levels and conversions against the schedulers' own steps, and against each other."""

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Generator, Tensor

from errata.correct.noise_levels import NoiseLevels, required
from errata.errors import PlanError

# torch and diffusers 0.42 mix tensors and arrays in ways that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

STEPS = 10
KINDS = ("epsilon", "v_prediction", "sample")

# First-order settings, in which a scheduler's own step is the deterministic DDIM (Euler) step.
FIRST_ORDER: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddim-offset": (
        DDIMScheduler,
        {"clip_sample": False, "steps_offset": 1, "beta_schedule": "scaled_linear"},
    ),
    "ddim-zero-snr": (
        DDIMScheduler,
        {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "deis": (DEISMultistepScheduler, {"solver_order": 1}),
    "deis-karras": (DEISMultistepScheduler, {"solver_order": 1, "use_karras_sigmas": True}),
    "dpm++": (DPMSolverMultistepScheduler, {"solver_order": 1}),
    "dpm++karras": (DPMSolverMultistepScheduler, {"solver_order": 1, "use_karras_sigmas": True}),
    "dpm++lu": (DPMSolverMultistepScheduler, {"solver_order": 1, "use_lu_lambdas": True}),
    "dpm++exponential": (DPMSolverMultistepScheduler, {"solver_order": 1, "use_exponential_sigmas": True}),
    "dpm++cosine": (
        DPMSolverMultistepScheduler,
        {"solver_order": 1, "use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
    ),
    "dpm++single": (DPMSolverSinglestepScheduler, {"solver_order": 1}),
    "dpm++single-karras": (DPMSolverSinglestepScheduler, {"solver_order": 1, "use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 1, "disable_corrector": list(range(STEPS))}),
    "unipc-karras": (
        UniPCMultistepScheduler,
        {"solver_order": 1, "disable_corrector": list(range(STEPS)), "use_karras_sigmas": True},
    ),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-leading": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler-log-linear": (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}),
}
# Others, whose denoiser calls hold the same levels although their step is another one.
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "heun-karras": (HeunDiscreteScheduler, {"use_karras_sigmas": True}),
    "lms": (LMSDiscreteScheduler, {}),
    "lms-karras": (LMSDiscreteScheduler, {"use_karras_sigmas": True}),
    "pndm": (PNDMScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 1}),
}
EVERY = FIRST_ORDER | OTHERS

every = pytest.mark.parametrize("name", EVERY)
kinds = pytest.mark.parametrize("kind", KINDS)


def fresh(name: str, kind: str = "epsilon") -> Any:
    scheduler, options = EVERY[name]
    return scheduler(**options, prediction_type=kind)


def started(name: str, kind: str = "epsilon") -> tuple[Any, tuple[float, ...], NoiseLevels]:
    """A scheduler with its timesteps set, these, and the levels found for them from an unset one."""
    scheduler = fresh(name, kind)
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # else a first timestep that repeats is taken for its second occurrence
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    return scheduler, timesteps, NoiseLevels.of(fresh(name, kind), timesteps, num_inference_steps=STEPS)


def noise(seed: int) -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=Generator().manual_seed(seed), dtype=torch.float64)


def supports(name: str, kind: str) -> bool:
    if name == "ddim-zero-snr":
        return kind != "epsilon"  # DDIM itself divides by zero then
    refuses_sample = name in ("pndm", "plms", "euler-a")
    return not (kind == "sample" and refuses_sample)


@kinds
@pytest.mark.parametrize("name", FIRST_ORDER)
def test_a_jump_is_the_schedulers_own_step(name: str, kind: str) -> None:
    if not supports(name, kind):
        pytest.skip("the scheduler refuses it")
    scheduler, timesteps, levels = started(name, kind)
    x = noise(0) * float(scheduler.init_noise_sigma)
    for step, t in enumerate(scheduler.timesteps):
        prediction = noise(step + 1)
        scheduler.scale_model_input(x, t)
        jumped = levels.jump(x, prediction, step, step + 1)
        taken = scheduler.step(prediction, t, x)[0]
        if step + 1 == len(timesteps):
            break  # a last step may leave noise; see the next test
        size = float(taken.abs().max())
        torch.testing.assert_close(jumped, taken.double(), rtol=0, atol=1e-5 * size)
        if step + 2 < len(timesteps):
            amiss = levels.jump(x, prediction, step, step + 2)
            assert (amiss - taken).abs().max() > 1e-4 * size
        x = taken.double()


@kinds
@pytest.mark.parametrize("name", ["ddim", "dpm++", "dpm++karras", "euler", "unipc"])
def test_a_jump_to_the_end_denoises(name: str, kind: str) -> None:
    """These end at no noise at all, so their own last step is the clean sample."""
    options = {"final_sigmas_type": "zero"} if "final_sigmas_type" in fresh(name, kind).config else {}
    scheduler = type(fresh(name)).from_config(fresh(name, kind).config, **options)
    scheduler.set_timesteps(STEPS)
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    levels = NoiseLevels.of(scheduler, timesteps, num_inference_steps=STEPS)
    x, prediction, last = noise(0), noise(1), STEPS - 1
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(last)
    scheduler.scale_model_input(x, scheduler.timesteps[last])
    taken = scheduler.step(prediction, scheduler.timesteps[last], x)[0]
    jumped = levels.jump(x, prediction, last, STEPS)
    assert torch.equal(jumped, levels.denoised(x, prediction, last))
    torch.testing.assert_close(jumped, taken.double(), rtol=1e-5, atol=1e-5)
    if kind != "sample":
        assert (taken - x).abs().max() > 1e-3


@kinds
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler-karras", "euler-a", "heun", "lms"])
def test_the_clean_sample_is_the_schedulers_own(name: str, kind: str) -> None:
    if not supports(name, kind):
        pytest.skip("the scheduler refuses it")
    if name.startswith("lms"):
        pytest.importorskip("scipy")
    scheduler, _, levels = started(name, kind)
    x = noise(0) * float(scheduler.init_noise_sigma)
    for step, t in enumerate(scheduler.timesteps):
        prediction = noise(step + 1)
        scheduler.scale_model_input(x, t)
        output = scheduler.step(prediction, t, x)
        clean = output.pred_original_sample.double()
        size = float(clean.abs().max())
        torch.testing.assert_close(levels.denoised(x, prediction, step), clean, rtol=0, atol=1e-5 * size)
        x = output.prev_sample.double()


@pytest.mark.parametrize("name", ["pndm", "plms", "heun", "heun-karras"])
def test_repeated_timesteps_hold_the_same_levels(name: str) -> None:
    """Runge-Kutta evaluates twice at one timestep: PNDM's and Heun's tables repeat."""
    _, timesteps, levels = started(name)
    assert len(levels.signal) == len(levels.noise) == len(timesteps) > STEPS
    assert len(set(timesteps)) < len(timesteps)
    for step, time in enumerate(timesteps):
        first = timesteps.index(time)
        assert (levels.signal[step], levels.noise[step]) == (levels.signal[first], levels.noise[first])
    ratio = [b / a for a, b in zip(levels.signal, levels.noise, strict=True)]
    assert len(set(ratio)) == len(set(timesteps))


@pytest.mark.parametrize("name", ["heun", "heun-karras"])
def test_heuns_first_half_is_a_jump(name: str) -> None:
    scheduler, timesteps, levels = started(name)
    x = noise(0) * float(scheduler.init_noise_sigma)
    for step, t in enumerate(scheduler.timesteps):
        prediction = noise(step + 1)
        jumped = levels.jump(x, prediction, step, step + 1)
        taken = scheduler.step(prediction, t, x)[0]
        if step % 2 == 0 and step + 1 < len(timesteps):
            size = float(taken.abs().max())
            torch.testing.assert_close(jumped, taken.double(), rtol=0, atol=1e-5 * size)
        x = taken.double()


def test_pndms_first_step_is_half_a_jump() -> None:
    """Its first Runge-Kutta stage goes from call 0 to call 1, half a step of the sampler."""
    scheduler, _, levels = started("pndm")
    x, prediction = noise(0), noise(1)
    taken = scheduler.step(prediction, scheduler.timesteps[0], x)[0]
    torch.testing.assert_close(levels.jump(x, prediction, 0, 1), taken, rtol=1e-5, atol=1e-5)
    assert (levels.jump(x, prediction, 0, 3) - taken).abs().max() > 1e-3


@every
def test_the_networks_input_is_scaled_as_the_scheduler_does(name: str) -> None:
    if name == "ddim-zero-snr":
        pytest.skip("predicts no noise")
    scheduler, _, levels = started(name)
    x = noise(0)
    for step, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = step
        torch.testing.assert_close(
            levels.scaled(x, step), scheduler.scale_model_input(x, t), rtol=1e-6, atol=0
        )
    assert torch.equal(levels.scaled(x, 0), x) == (not levels.scales_input)


@kinds
@pytest.mark.parametrize("name", ["ddim", "dpm++karras", "euler"])
def test_round_trips(name: str, kind: str) -> None:
    _, _, levels = started(name, kind)
    clean, eps = noise(0), noise(1)
    for step, (a, b) in enumerate(zip(levels.signal, levels.noise, strict=True)):
        x = a * clean + b * eps
        prediction = levels.prediction(x, eps, step)
        torch.testing.assert_close(levels.epsilon(x, prediction, step), eps, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(levels.denoised(x, prediction, step), clean, rtol=1e-9, atol=1e-9)
        if kind == "v_prediction":
            v = (a * eps - b * clean) / levels.divisor(step)
            torch.testing.assert_close(prediction, v, rtol=1e-9, atol=1e-9)


@every
def test_the_scheduler_stays_as_it_is(name: str) -> None:
    kind = "v_prediction" if name == "ddim-zero-snr" else "epsilon"
    scheduler, timesteps, levels = started(name, kind)
    before = copy.deepcopy(scheduler)
    assert NoiseLevels.of(scheduler, timesteps, num_inference_steps=STEPS) == levels
    assert torch.equal(scheduler.timesteps, before.timesteps)
    assert repr(vars(scheduler)) == repr(vars(before))


@pytest.mark.parametrize("name", ["dpm++", "euler", "heun"])
def test_the_number_of_steps_can_be_told_from_the_timesteps(name: str) -> None:
    _, timesteps, levels = started(name)
    assert NoiseLevels.of(fresh(name), timesteps) == levels


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler"])
def test_guidance_in_two_calls(name: str) -> None:
    _, timesteps, levels = started(name)
    twice = tuple(time for time in timesteps for _ in range(2))
    doubled = NoiseLevels.of(fresh(name), twice, num_inference_steps=STEPS)
    assert doubled.noise[::2] == doubled.noise[1::2] == levels.noise
    assert doubled.signal[::2] == doubled.signal[1::2] == levels.signal


@pytest.mark.parametrize("name", ["ddim", "dpm++", "euler", "heun"])
def test_a_run_that_starts_in_the_middle(name: str) -> None:
    _, timesteps, levels = started(name)
    late = NoiseLevels.of(fresh(name), timesteps[4:], num_inference_steps=STEPS)
    assert (late.signal, late.noise) == (levels.signal[4:], levels.noise[4:])


def test_half_precision_is_computed_in_single() -> None:
    """A clean sample beyond float16's range (65,504) on the way to a result within it."""
    _, _, levels = started("ddim")
    x, prediction = noise(0).half() * 1000, noise(1).half() * 1000
    jumped = levels.jump(x, prediction, 0, 1)
    wide = levels.jump(x.double(), prediction.double(), 0, 1)
    assert levels.denoised(x.double(), prediction.double(), 0).abs().max() > 65_504
    assert jumped.dtype == torch.float16
    torch.testing.assert_close(jumped.double(), wide, rtol=1e-3, atol=1e-3 * float(wide.abs().max()))


class Bent(DDIMScheduler):  # type: ignore[misc]
    pass


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            FlowMatchEulerDiscreteScheduler(),
            "FlowMatchEulerDiscreteScheduler are not known; known .*DDIMS",
        ),
        (TCDScheduler(), "TCDScheduler are not known"),
        (Bent(), "Bent are not known; known are .* choose a method that needs none"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True), "use_flow_sigmas=True is a flow"),
        (DDIMScheduler(prediction_type="score"), "predicts 'score'; noise levels are known for epsilon, v_"),
    ],
)
def test_unknown_schedulers(scheduler: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        NoiseLevels.of(scheduler, (999.0, 499.0), num_inference_steps=2)


@pytest.mark.parametrize(
    ("name", "timesteps", "message"),
    [
        ("ddim", (900.0, 1000.0), "step 1 was recorded at timestep 1000, but DDIM.* whole numbers 0 to 999"),
        ("ddim", (900.5,), "step 0 was recorded at timestep 900.5"),
        (
            "euler",
            (999.0, 888.0, 500.0),
            "3 calls .* 999, 888, 500, but EulerD.*=10 has 10, 999, 888, 777",
        ),
        ("euler", (999.0,) * 30, "30 calls were recorded"),
    ],
)
def test_timesteps_that_the_scheduler_does_not_have(
    name: str, timesteps: tuple[float, ...], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        NoiseLevels.of(fresh(name), timesteps, num_inference_steps=STEPS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"signal": (0.5,), "noise": (0.5, 0.5)}, "1 levels of signal and 2 of noise"),
        ({"signal": (0.5,), "noise": (0.0,)}, "step 0 has 0.5 of the signal and 0 of noise"),
        ({"signal": (float("nan"),), "noise": (1.0,)}, "step 0 has nan"),
        ({"signal": (0.0,), "noise": (1.0,)}, "step 0 is pure noise"),
        (
            {"signal": (0.5,), "noise": (0.5,), "prediction_type": "score"},
            "'score' is not known; known are eps",
        ),
    ],
)
def test_levels_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        NoiseLevels(**fields)


def test_levels_that_a_method_requires() -> None:
    levels = NoiseLevels(signal=(0.0, 0.6), noise=(1.0, 0.8), prediction_type="v_prediction")
    assert required(levels, object(), [1]) is levels
    with pytest.raises(PlanError, match="object needs the noise level .* such as IEC"):
        required(None, object(), [1])
    with pytest.raises(PlanError, match=r"step 0 is nothing but noise .* steps='1-1'"):
        required(levels, object(), [0, 1])
