"""Epsilon scaling: shrink the predicted noise by a constant, against exposure bias.

    symbol      here                meaning
    ε           levels.epsilon(…)   ε(x_t, t), guided where the pipeline guides
    λ_i         scale + slope i     what ε is divided by at step i of the sampler, 0 the noisiest

A sampler feeds a network its own errors, and the predictions come out longer than in training. Dividing them
by a number slightly above 1 brings their norm back. It takes no evaluation and costs nothing. A network that
predicts v or x_0 is scaled in ε, and its prediction is computed from that.

Source: Ning et al., "Elucidating the Exposure Bias in Diffusion Models", ICLR 2024: ε / λ_t, λ_t = k t + b,
where t counts down to 0 at the cleanest step; in those terms k = -slope and b = scale + slope (T - 1). The
authors' code has k = 0 and, at 100 steps, b from 1.004 (ImageNet 128) to 1.017 (CIFAR-10). The default is the
smallest of these. Quantization and caches add errors of their own, so search around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import Correction, Corrector, CorrectorContext, StepView
from errata.correct.noise_levels import required
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.correct.validation import is_number, require
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule


@register_method
@dataclass(frozen=True, kw_only=True)
class EpsilonScaling(StoredDataclass):
    """Epsilon scaling: ε divided by scale + slope i at every step i; no evaluation.

    Attributes:
        scale: divisor of the predicted noise at step 0; λ, above 0. 1 without a slope changes nothing.
        slope: what the divisor grows by from step to step; finite.

    Raises:
        PlanError: a value outside these ranges.
    """

    traits = Traits(changes_prediction=True, needs_noise_levels=True)

    scale: float = 1.004
    slope: float = 0.0

    def __post_init__(self) -> None:
        is_scale = is_number(self.scale) and 0 < self.scale < float("inf")
        require(is_scale, self, "scale", "finite and above 0")
        require(is_number(self.slope) and math.isfinite(self.slope), self, "slope", "finite")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return every step: it needs only the prediction."""
        return tuple(range(schedule.num_steps))

    def check(self, context: CorrectorContext) -> None:
        """Check that no step is pure noise, and that λ stays above 0."""
        required(context.levels, self, context.steps)
        for step in context.steps:
            if not self.at(step, context.schedule) > 0:
                raise PlanError(
                    f"EpsilonScaling(scale={self.scale!r}, slope={self.slope!r}) divides by "
                    f"{self.at(step, context.schedule):g} at step {step}; the divisor must stay above 0: "
                    "use a smaller slope"
                )

    def at(self, step: int, schedule: CacheSchedule) -> float:
        """Return λ at denoiser call `step`."""
        return self.scale + self.slope * (step // schedule.calls_per_step)

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _Division(self, context)


class _Division(Corrector):
    """Epsilon scaling on one run; no state passes from step to step."""

    def __init__(self, choices: EpsilonScaling, context: CorrectorContext) -> None:
        super().__init__(context)
        self._choices = choices
        self._levels = required(context.levels, choices, context.steps)

    def at_step(self, view: StepView) -> Correction | None:
        scale = self._choices.at(view.step, self.context.schedule)
        if scale == 1:
            return None  # converting v to ε and back would change the last bit
        wide = torch.promote_types(view.prediction.dtype, torch.float32)
        x = view.sample.to(wide)
        eps = self._levels.epsilon(x, view.prediction, view.step)
        prediction = self._levels.prediction(x, eps / scale, view.step)
        return Correction(prediction=prediction.to(view.prediction.dtype))
