"""How much signal and noise a sample has at each call of the denoiser.

    symbol      here                meaning
    x           x                   the sample as the pipeline holds it, before `scale_model_input`
    a_i, b_i    signal[i], noise[i] x = a_i x_0 + b_i ε at call i
    ε           epsilon             the noise in x
    x_0         denoised            the clean sample in x
    c_i         divisor(i)          what `scale_model_input` divides by; 1 where it changes nothing
    v           prediction          (a_i ε - b_i x_0) / c_i, the "v_prediction" of diffusers

Two forms occur in diffusers 0.42. Variance-preserving: a² + b² = 1 and c = 1 (DDIM, DDPM, PNDM by timestep;
DEIS, DPM-Solver, UniPC by σ = b / a). Variance-exploding: a = 1, b = σ and c = sqrt(1 + σ²) (Euler, Heun,
LMS). Both give x / c = α x_0 + s ε with α = a / c, s = b / c and α² + s² = 1, so v is one formula.

Sources: DDIM (Song et al., ICLR 2021), eq. 12; v: Salimans and Ho, ICLR 2022, section 4 and appendix D; the
tables are read from the schedulers of diffusers themselves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import PlanError
from errata.runtime.unet_arguments import is_same_timestep

# Read in diffusers 0.42; `tests/correct/test_noise_levels.py` checks each against its own step.
_BY_TIMESTEP = frozenset({"DDIMScheduler", "DDPMScheduler", "PNDMScheduler"})
_PRESERVING = frozenset(
    {
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
    }
)
_EXPLODING = frozenset(
    {
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
    }
)
# Euler takes both names for a prediction of x_0.
_PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "original_sample": "sample",
}


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """x_i = signal[i] x_0 + noise[i] ε at denoiser call i, and the conversions that follow from it.

    Every function takes samples `(B, …)` of any floating-point type, computes in float32 or wider, returns
    the type of `x`, and neither clips nor thresholds.

    Attributes:
        signal: a_i of each of the T calls; 0 where the first step is pure noise (zero terminal SNR).
        noise: b_i, likewise; above 0.
        prediction_type: "epsilon", "v_prediction" or "sample" (x_0): what the network predicts.
        scales_input: whether `scale_model_input` divides by sqrt(signal² + noise²), or by nothing.

    Raises:
        PlanError: another prediction type, tables of different lengths, a level that is out of range.
    """

    signal: tuple[float, ...]
    noise: tuple[float, ...]
    prediction_type: str = "epsilon"
    scales_input: bool = False

    def __post_init__(self) -> None:
        if self.prediction_type not in set(_PREDICTION_TYPES.values()):
            raise PlanError(
                f"prediction type {self.prediction_type!r} is not known; known are "
                "epsilon, v_prediction, sample"
            )
        if len(self.signal) != len(self.noise):
            raise PlanError(
                f"{len(self.signal)} levels of signal and {len(self.noise)} of noise; give one each per call"
            )
        for step, (a, b) in enumerate(zip(self.signal, self.noise, strict=True)):
            if not (0 <= a < math.inf and 0 < b < math.inf):
                raise PlanError(
                    f"step {step} has {a:g} of the signal and {b:g} of noise; both must be finite, and the "
                    "noise above 0; choose a method that needs no noise levels, such as IEC"
                )
            if a == 0 and self.prediction_type == "epsilon":
                raise PlanError(
                    f"step {step} is pure noise, so a prediction of the noise says nothing about the clean "
                    "sample; a model with zero terminal SNR predicts v: check prediction_type"
                )

    @classmethod
    def of(
        cls, scheduler: Any, timesteps: tuple[float, ...], *, num_inference_steps: int | None = None
    ) -> NoiseLevels:
        """Return the levels of a diffusers scheduler at recorded calls; `scheduler` stays as it is.

        Args:
            scheduler: as the pipeline has it; its timesteps need not be set.
            timesteps: of each denoiser call. They may repeat as the scheduler repeats them (PNDM, Heun), come
                two or three times each (guidance in several calls), and start in the middle of its table
                (image to image).
            num_inference_steps: of the scheduler's table; None takes the number of different timesteps, which
                is wrong if the run starts in the middle of the table.

        Raises:
            PlanError: the levels of this class, or of this use of it, are not known, or its timesteps are not
                the recorded ones.
        """
        name, config = _known(scheduler), scheduler.config
        prediction_type = _PREDICTION_TYPES.get(config.prediction_type)
        if prediction_type is None:
            raise PlanError(
                f"{name} predicts {config.prediction_type!r}; noise levels are known for "
                f"{', '.join(_PREDICTION_TYPES)}: choose a method that needs none, such as IEC"
            )
        if name in _BY_TIMESTEP:
            alphas = [_alpha_cumprod(scheduler, time, step) for step, time in enumerate(timesteps)]
            signal = tuple(math.sqrt(alpha) for alpha in alphas)
            noise = tuple(math.sqrt(1 - alpha) for alpha in alphas)
            return cls(signal=signal, noise=noise, prediction_type=prediction_type)
        count = len(set(timesteps)) if num_inference_steps is None else num_inference_steps
        sigmas = _sigmas(scheduler, timesteps, count)
        if name in _EXPLODING:
            ones = (1.0,) * len(sigmas)
            return cls(signal=ones, noise=sigmas, prediction_type=prediction_type, scales_input=True)
        return cls(
            signal=tuple(1 / math.hypot(1, sigma) for sigma in sigmas),
            noise=tuple(sigma / math.hypot(1, sigma) for sigma in sigmas),
            prediction_type=prediction_type,
        )

    def denoised(self, x: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return the x_0 that `prediction` means for `x` at call `step`."""
        a, b, c = self.signal[step], self.noise[step], self.divisor(step)
        wide, p = _widened(x, prediction)
        if self.prediction_type == "sample":
            x_0 = p
        elif self.prediction_type == "epsilon":
            x_0 = (wide - b * p) / a
        else:
            x_0 = (a * wide / c - b * p) / c
        return x_0.to(x.dtype)

    def epsilon(self, x: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return the ε that `prediction` means for `x` at call `step`."""
        a, b, c = self.signal[step], self.noise[step], self.divisor(step)
        wide, p = _widened(x, prediction)
        if self.prediction_type == "sample":
            eps = (wide - a * p) / b
        elif self.prediction_type == "epsilon":
            eps = p
        else:
            eps = (a * p + b * wide / c) / c
        return eps.to(x.dtype)

    def prediction(self, x: Tensor, epsilon: Tensor, step: int) -> Tensor:
        """Return the scheduler's kind of prediction that means `epsilon`; inverse of `epsilon`.

        Where `signal[step]` is 0 no prediction is determined by ε, and the result is not finite.
        """
        a, b, c = self.signal[step], self.noise[step], self.divisor(step)
        wide, eps = _widened(x, epsilon)
        if self.prediction_type == "epsilon":
            return eps.to(x.dtype)
        if self.prediction_type == "sample":
            return ((wide - b * eps) / a).to(x.dtype)
        return ((c * eps - b * wide / c) / a).to(x.dtype)

    def jump(self, x: Tensor, prediction: Tensor, step: int, to: int) -> Tensor:
        """Return `x` after one deterministic DDIM step from call `step` to call `to`; T is the clean sample.

        In either form it is Euler's step of the probability-flow ODE in ε and σ = b / a.
        """
        wide, p = _widened(x, prediction)
        x_0 = self.denoised(wide, p, step)
        if to == len(self.signal):
            return x_0.to(x.dtype)
        return (self.signal[to] * x_0 + self.noise[to] * self.epsilon(wide, p, step)).to(x.dtype)

    def scaled(self, x: Tensor, step: int) -> Tensor:
        """Return what `scale_model_input` makes of `x` at call `step`."""
        return x / self.divisor(step) if self.scales_input else x

    def divisor(self, step: int) -> float:
        """Return what `scale_model_input` divides by at call `step`."""
        return math.hypot(self.signal[step], self.noise[step]) if self.scales_input else 1.0


def check_known(levels: NoiseLevels | None, method: object) -> NoiseLevels:
    """Return `levels`, which `method` needs.

    Raises:
        PlanError: they are not known.
    """
    if levels is None:
        raise PlanError(
            f"{type(method).__name__} needs the noise level of every step, which is not known for this "
            "scheduler; choose a method that needs none, such as IEC or Forecast"
        )
    return levels


def required(levels: NoiseLevels | None, method: object, steps: Iterable[int]) -> NoiseLevels:
    """Return `levels`, for a method that works in ε at `steps`.

    Raises:
        PlanError: they are not known, or one of the steps is pure noise, where the network's prediction says
            nothing about ε.
    """
    known = check_known(levels, method)
    for step in steps:
        if known.signal[step] == 0:
            raise PlanError(
                f"{type(method).__name__} works on the noise in a sample, but step {step} is nothing but "
                "noise (zero terminal SNR); leave it out, such as "
                f"steps={f'{step + 1}-{len(known.signal) - 1}'!r}"
            )
    return known


def _known(scheduler: Any) -> str:
    kind = type(scheduler)
    known = _BY_TIMESTEP | _PRESERVING | _EXPLODING
    if not kind.__module__.startswith("diffusers.") or kind.__name__ not in known:
        raise PlanError(
            f"the noise levels of {kind.__module__}.{kind.__name__} are not known; known are those of "
            f"diffusers' {', '.join(sorted(known))}: choose a method that needs none, such as IEC"
        )
    if scheduler.config.get("use_flow_sigmas", False):
        raise PlanError(
            f"{kind.__name__} with use_flow_sigmas=True is a flow, whose noise levels are not known; "
            "choose a method that needs none, such as IEC"
        )
    return kind.__name__


def _alpha_cumprod(scheduler: Any, timestep: float, step: int) -> float:
    total = len(scheduler.alphas_cumprod)
    if timestep != int(timestep) or not 0 <= timestep < total:
        raise PlanError(
            f"step {step} was recorded at timestep {timestep:g}, but {type(scheduler).__name__} has the "
            f"whole numbers 0 to {total - 1}; pass the scheduler that the model was recorded with"
        )
    return float(scheduler.alphas_cumprod[int(timestep)])


def _sigmas(scheduler: Any, timesteps: tuple[float, ...], num_inference_steps: int) -> tuple[float, ...]:
    """Return the scheduler's own σ at every call, from a copy with its timesteps set."""
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(num_inference_steps)
    table = [float(t) for t in fresh.timesteps]
    for calls in (1, 2, 3):  # a sampler step; more than one where guidance takes several
        start = len(table) - len(timesteps) // calls
        rows = [start + call // calls for call in range(len(timesteps))]
        if len(timesteps) % calls == 0 and start >= 0 and _agree(timesteps, [table[row] for row in rows]):
            return tuple(float(fresh.sigmas[row]) for row in rows)
    raise PlanError(
        f"{len(timesteps)} calls were recorded at the timesteps {_shown(timesteps)}, but "
        f"{type(scheduler).__name__} with num_inference_steps={num_inference_steps} has {len(table)}, "
        f"{_shown(table)}; pass the scheduler and the number of steps that the model was recorded with"
    )


def _agree(recorded: tuple[float, ...], table: list[float]) -> bool:
    return all(map(is_same_timestep, recorded, table))


def _shown(timesteps: tuple[float, ...] | list[float]) -> str:
    shown = [f"{time:g}" for time in timesteps[:4]]
    return ", ".join([*shown, "…"] if len(timesteps) > 4 else shown)


def _widened(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide), other.to(wide)
