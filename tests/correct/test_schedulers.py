"""IEC on other samplers: the blend against Eq. 10 on deep copies, and what a preview must not disturb."""

import copy
import inspect
from collections.abc import Callable
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
    HeunDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Generator, Tensor

from errata.correct import IEC, Plan, wrap
from errata.correct.preview import SchedulerStep
from errata.correct.step_rule import is_linear, may_draw_noise
from errata.deploy import DeployedPipeline

STEPS, STEP_SIZE, ITERATIONS = 8, 0.5, 2

LINEAR: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddim-v": (DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}),
    "ddim-x0": (DDIMScheduler, {"clip_sample": False, "prediction_type": "sample"}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "deis": (DEISMultistepScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++3": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpm-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++single": (DPMSolverSinglestepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": (UniPCMultistepScheduler, {}),
}
BENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim-clip": (DDIMScheduler, {"clip_sample": True}),
    "ddim-threshold": (DDIMScheduler, {"clip_sample": False, "thresholding": True}),
    "ddpm-clip": (DDPMScheduler, {"clip_sample": True}),
    "dpm++threshold": (DPMSolverMultistepScheduler, {"thresholding": True}),
    "heun-clip": (HeunDiscreteScheduler, {"clip_sample": True}),
    "unlisted": (TCDScheduler, {"clip_sample": False}),
}
# torch and diffusers 0.42 mix tensors and arrays in ways that NumPy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

NOISY = {"ddpm", "dpm-sde", "euler-a", "ddpm-clip", "unlisted"}

every = pytest.mark.parametrize("name", [*LINEAR, *BENT])
linear = pytest.mark.parametrize("name", LINEAR)


def network(x: Tensor, step: int) -> Tensor:
    """Smooth, neither linear nor small, different at every step."""
    return torch.sin(2 * x + step) + 0.5 * torch.roll(x, 1, dims=-1).cos()


def fresh(name: str) -> Any:
    scheduler, options = (LINEAR | BENT)[name]
    return scheduler(**options)


def latents() -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=Generator().manual_seed(5))


def pending_step(scheduler: Any, *args: Any, **kwargs: Any) -> SchedulerStep:
    bound = inspect.signature(scheduler.step).bind(*args, **kwargs)
    return SchedulerStep(scheduler, scheduler.step, bound)


def by_deep_copies(name: str, generator: Generator, *, iterations: int) -> Tensor:
    """Eq. 10 with whole copies of scheduler and generator; the history receives the blended prediction.

    A v or x_0 (DDIM here) is read as ε at the iterate, and handed on as what means this ε at x_t.
    """
    scheduler = fresh(name)
    scheduler.set_timesteps(STEPS)
    draws = {"generator": generator} if name in NOISY else {}
    x = latents() * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):

        def step(eps: Tensor, x: Tensor = x, t: Tensor = t) -> Tensor:
            ahead = {key: Generator().set_state(value.get_state()) for key, value in draws.items()}
            result: Tensor = copy.deepcopy(scheduler).step(eps, t, x, **ahead)[0]
            return result

        eps = network(scheduler.scale_model_input(x, t), i)
        y = step(eps)
        for _ in range(iterations):
            eps_y = network(scheduler.scale_model_input(y, t), i)
            if name in ("ddim-v", "ddim-x0"):
                eps_y = carried(name, eps_y, y, x, scheduler.alphas_cumprod[t].double())
            y = y + STEP_SIZE * (step(eps_y) - y)
            eps = eps + STEP_SIZE * (eps_y - eps)
        taken = scheduler.step(eps, t, x, **draws)[0]
        x = taken if is_linear(scheduler) and iterations else (y if iterations else taken)
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    return x


def carried(name: str, prediction: Tensor, y: Tensor, x: Tensor, alpha_bar: Tensor) -> Tensor:
    """What means at x the ε that `prediction` means at y, solved for by hand.

    v: a v' + b x = a v + b y. x_0: (x - a x_0') / b = (y - a x_0) / b.
    """
    a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    moved: Tensor = (b / a) * (y - x) if name == "ddim-v" else (x - y) / a
    return prediction + moved.to(x.dtype)


@pytest.fixture
def deployed(deploy_closed_form: Callable[..., DeployedPipeline], name: str) -> DeployedPipeline:
    return deploy_closed_form(network, fresh(name), STEPS)


@every
def test_equals_equation_10(deployed: DeployedPipeline, name: str) -> None:
    """On linear rules the reference also finds the blend and Eq. 10 alike at every step."""
    corrected = wrap(
        deployed, Plan(IEC(step_size=STEP_SIZE, iterations=ITERATIONS, tolerance=0.0, guard=False))
    )
    expected = by_deep_copies(name, Generator().manual_seed(7), iterations=ITERATIONS)
    actual = corrected(latents=latents(), generator=Generator().manual_seed(7))
    plain = by_deep_copies(name, Generator().manual_seed(7), iterations=0)
    size = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * size)
    assert (plain - expected).abs().max() > 1e-2 * size
    assert torch.equal(deployed(latents=latents(), generator=Generator().manual_seed(7)), plain)


@every
def test_a_preview_leaves_no_trace(name: str) -> None:
    scheduler, twin = fresh(name), fresh(name)
    generator, twin_generator = Generator().manual_seed(1), Generator().manual_seed(1)
    takes_generator = {"generator": generator} if name in NOISY else {}
    twin_takes = {"generator": twin_generator} if name in NOISY else {}
    scheduler.set_timesteps(STEPS)
    twin.set_timesteps(STEPS)
    x = latents()
    for i, t in enumerate(scheduler.timesteps):
        eps = network(scheduler.scale_model_input(x, t), i)
        twin.scale_model_input(x, t)
        pending = pending_step(scheduler, eps, t, x, **takes_generator)
        before = torch.get_rng_state()
        previews = [pending.preview(eps) for _ in range(2)]
        pending.preview(eps + 1)
        pending.scaled(x)
        assert torch.equal(torch.get_rng_state(), before)
        assert same(vars(scheduler), vars(twin))
        after, x = twin.step(eps, t, x, **twin_takes)[0], pending.take(eps)[0]
        assert torch.equal(previews[0], x)
        assert torch.equal(previews[1], x)
        assert torch.equal(after, x)
        assert torch.equal(generator.get_state(), twin_generator.get_state())


@linear
def test_the_rules_called_linear_are(name: str) -> None:
    scheduler = fresh(name)
    assert is_linear(scheduler)
    scheduler.set_timesteps(STEPS)
    x = latents() * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        one, other = network(scheduler.scale_model_input(x, t), i), network(x + 1, i)
        pending = pending_step(scheduler, one, t, x)
        with torch.random.fork_rng(devices=[]):
            blend = pending.preview(0.3 * one + 0.7 * other)
        expected = 0.3 * pending.preview(one) + 0.7 * pending.preview(other)
        torch.testing.assert_close(blend, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        x = pending.take(one)[0]


@pytest.mark.parametrize("name", BENT)
def test_the_others_are_not_called_linear(name: str) -> None:
    assert not is_linear(fresh(name))


def test_a_subclass_is_not_taken_for_its_parent() -> None:
    class Bent(DDIMScheduler):  # type: ignore[misc]
        pass

    assert not is_linear(Bent(clip_sample=False))
    assert may_draw_noise(Bent(clip_sample=False), {})


@every
def test_noise_is_foreseen(name: str) -> None:
    """A step that is said to draw no noise draws none."""
    scheduler = fresh(name)
    scheduler.set_timesteps(STEPS)
    t, x = scheduler.timesteps[0], latents()
    scheduler.scale_model_input(x, t)
    before = torch.get_rng_state()
    scheduler.step(network(x, 0), t, x)
    draws = not torch.equal(torch.get_rng_state(), before)
    assert draws == (name in NOISY)
    assert may_draw_noise(scheduler, {}) == draws


@pytest.mark.parametrize("arguments", [{"eta": 0.5}, {"eta": 1.0}])
def test_ddim_draws_noise_where_eta_says_so(arguments: dict[str, float]) -> None:
    assert may_draw_noise(DDIMScheduler(), arguments)
    assert may_draw_noise(EulerDiscreteScheduler(), {"s_churn": 1.0})


def same(one: Any, other: Any) -> bool:
    """Whether two states hold equal values, whatever their containers share."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(repr(one) == repr(other))
