"""What is known about the step rules of diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.correct.corrector import CorrectorContext

# Read in diffusers 0.42: apart from clipping and thresholding, the sample that `step` returns is affine in
# `model_output`, given the history. `tests/correct/test_schedulers.py` checks each.
_LINEAR = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)

# Of those, the ones whose step draws no noise whatever its arguments.
_NOISELESS = frozenset(
    {
        "DEISMultistepScheduler",
        "HeunDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)

# The argument that has to be above zero for the step to draw noise.
_NOISE_ARGUMENT = {"DDIMScheduler": "eta", "EulerDiscreteScheduler": "s_churn"}


def is_linear(scheduler: Any) -> bool:
    """Return whether the step is linear (affine) in the prediction: blending predictions blends samples.

    False for a class that is not listed here: then the exact iterate is used, which is right for any rule.
    `clip_sample=True` (the default of DDIM in diffusers) and `thresholding=True` make any class non-linear.
    A rule is not linear either when the pipeline bends the prediction after guiding it (`guidance_rescale`);
    that is the concern of `errata.correct.guidance`.
    """
    config = scheduler.config
    clips = bool(config.get("clip_sample", False) or config.get("thresholding", False))
    return _is_listed(scheduler, _LINEAR) and not clips


def keeps_samples(scheduler: Any) -> bool:
    """Return whether later steps start from the sample that a step returned, so a change of it is kept.

    Heun, PNDM with its Runge-Kutta start, UniPC and the single-step DPM-Solver go back to a sample that they
    saw before. PNDM without that start does so at its first call alone. False for a class not listed here.
    """
    if type(scheduler).__name__ == "PNDMScheduler":
        return bool(scheduler.config.get("skip_prk_steps", False))
    forgetful = {"DPMSolverSinglestepScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"}
    return _is_listed(scheduler, (_LINEAR | {"LMSDiscreteScheduler"}) - forgetful)


def check_keeps_samples(method: object, context: CorrectorContext) -> None:
    """Check that the scheduler goes on from a sample that `method` changed.

    Raises:
        PlanError: it would go back to an earlier one.
    """
    if not context.keeps_samples:
        raise PlanError(
            f"{type(method).__name__} changes the sample after a step, but this scheduler goes back to "
            "earlier samples, which would lose the change; sample with DDIM, Euler or DPM-Solver++ "
            "(multistep), or choose a method that changes predictions, such as IEC or Forecast"
        )


def may_draw_noise(scheduler: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether a step called with `arguments` may draw random numbers; True for an unlisted class."""
    if _is_listed(scheduler, _NOISELESS):
        return False
    name = type(scheduler).__name__
    if _is_listed(scheduler, frozenset(_NOISE_ARGUMENT)):
        return bool(arguments.get(_NOISE_ARGUMENT[name], 0.0))
    if name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
        return str(scheduler.config.algorithm_type).startswith("sde")
    return True


def _is_listed(scheduler: Any, names: frozenset[str]) -> bool:
    kind = type(scheduler)
    return kind.__module__.startswith("diffusers.") and kind.__name__ in names
