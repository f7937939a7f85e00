"""SecondOrder: a second-order step made of a first-order one, by averaging ε over the step.

    symbol      here                meaning
    x_t         view.sample         the sample that the step starts from
    ε           view.prediction     ε(x_t, t), guided where the pipeline guides
    y           y                   the plain step, preview(ε), at the noise level of the next call
    ε'          eps_ahead           ε(y, t'), evaluated at the next call's timestep t', with its scales
    w           weight              ε_w = (1 - w) ε + w ε'; w = 1/2 is the trapezoidal rule

DDIM is Euler's method for dx̄/dσ = ε(x, t), where x̄ = x / a and σ = b / a for x = a x_0 + b ε. Its step with
ε_w and w = 1/2 is Heun's, so the global error falls with the square of the step size. The same step of the
scheduler is taken, with another prediction, so η, clipping and noise stay the pipeline's.

The average is of what both evaluations mean as ε. Where the network predicts v or x_0, ε' is turned into the
prediction that would mean it at x_t, and predictions are averaged: they are affine in ε.

It is for samplers of first order: DDIM, DDPM, Euler and Euler's ancestral method. A sampler of higher order
(PNDM, Heun, DPM-Solver of order 2, DEIS, UniPC) expects predictions for the start of a step; with averages
instead it falls back to first order.

Source: Karras et al., NeurIPS 2022, Algorithm 1 (Heun in σ); Song et al., ICLR 2021 (DDIM), eq. 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import Correction, Corrector, CorrectorContext, StepView
from errata.correct.methods.iec import refine, residual
from errata.correct.noise_levels import required
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.correct.validation import is_number, require
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule


@register_method
@dataclass(frozen=True, kw_only=True)
class SecondOrder(StoredDataclass):
    """Second-order steps: ε averaged over the step, at full steps; one more full evaluation each.

    Attributes:
        weight: weight of the evaluation at the end of the step; w in [0, 1]. 0 changes nothing.
        cache_after: which feature the following cached steps read; "keep", that of x_t, or "replace", that of
            the evaluation at the end of the step, which is nearer to them. Without a cache it has no effect.

    Raises:
        PlanError: a value outside these ranges.
    """

    traits = Traits(changes_prediction=True, is_second_order=True, needs_noise_levels=True)

    weight: float = 0.5
    cache_after: Literal["replace", "keep"] = "keep"

    def __post_init__(self) -> None:
        require(is_number(self.weight) and 0 <= self.weight <= 1, self, "weight", "in [0, 1]")
        require(self.cache_after in ("replace", "keep"), self, "cache_after", '"replace" or "keep"')

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return the full steps but the sampler's last: no call follows it at which to evaluate."""
        end = schedule.num_steps - schedule.calls_per_step
        return tuple(step for step in schedule.full_steps if step < end)

    def check(self, context: CorrectorContext) -> None:
        """Check that no step is pure noise, and that every selected step moves in time."""
        required(context.levels, self, context.steps)
        for step in context.steps:
            ahead = step + context.schedule.calls_per_step
            time, next_time = context.timesteps[step], context.timesteps[ahead]
            if not next_time < time:
                raise PlanError(
                    f"SecondOrder averages over a step, but step {step} at timestep {time:g} is followed by "
                    f"step {ahead} at {next_time:g}: a sampler that repeats timesteps is of higher order "
                    "already; record the model with DDIM or Euler, or leave this step out"
                )

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _Average(self, context)


class _Average(Corrector):
    """SecondOrder on one run; no state passes from step to step."""

    def __init__(self, choices: SecondOrder, context: CorrectorContext) -> None:
        super().__init__(context)
        self._choices = choices
        self._levels = required(context.levels, choices, context.steps)

    def at_step(self, view: StepView) -> Correction:
        levels, choices = self._levels, self._choices
        wide = torch.promote_types(view.prediction.dtype, torch.float32)
        x, eps = view.sample.to(wide), view.prediction.to(wide)
        y = view.preview(view.prediction).to(wide)
        ahead = view.step + self.context.schedule.calls_per_step  # which receives what this step returns
        prediction_ahead, features = view.evaluate(y, step=ahead)
        eps_ahead = levels.epsilon(y, prediction_ahead, ahead)
        # From here on both are predictions for x, of the network's own kind.
        average = refine(eps, levels.prediction(x, eps_ahead, view.step), choices.weight)
        return Correction(
            prediction=average.to(view.prediction.dtype),
            features=features if features and choices.cache_after == "replace" else None,
            features_step=view.step + self.context.schedule.calls_per_step,
            residuals=[(None, residual(average, eps))],
        )
