"""The Langevin corrector of predictor-corrector samplers: move x_{t-1} within its own noise level.

    symbol      here                meaning
    x           x                   the sample that the step returns, at the noise level of the next call
    a, b        signal, noise       x = a x_0 + b ε at that call
    g           g                   the score there, -ε(x, t') / b
    z           z                   fresh standard normal noise
    r           snr                 "signal-to-noise ratio"
    α           alpha               (a / a')², a' the signal at the call after it (1 at the end)
    ε_i         step_size           2 α (r ‖z‖ / ‖g‖)²

Iteration: x ← x + ε_i g + sqrt(2 ε_i) z. With the right score it leaves the distribution of samples at that
noise level unchanged, and pulls stray samples towards it: earlier errors are forgotten, at the price of
noise.

Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021,
Algorithm 4 (variance exploding: α = 1, because a = 1) and Algorithm 5 (variance preserving: α_i = 1 - β_i).
Interpretations and deviations:

- α_i belongs to the chain that is sampled: ᾱ_i / ᾱ_{i-1} over neighbouring calls, which is 1 - β_i where
  every training timestep is sampled, as in the paper.
- Norms are those of each sample. The authors' code takes their mean over the batch, which makes an image
  depend on its neighbours.
- The scheduler does not know of it: a multistep history still holds the plain predictions, and a sampler that
  goes back to an earlier sample (the first half of Heun's steps, PNDM's Runge-Kutta) loses the change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import Correction, Corrector, CorrectorContext, Rows, StepView
from errata.correct.methods.iec import residual
from errata.correct.noise_levels import NoiseLevels, required
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.correct.validation import is_count, is_number, require
from errata.runtime.schedule import CacheSchedule


@register_method
@dataclass(frozen=True, kw_only=True)
class Langevin(StoredDataclass):
    """Langevin steps after every step of the sampler but the last; one full evaluation each.

    Attributes:
        snr: signal-to-noise ratio; r, above 0. 0.16 is the paper's for CIFAR-10. The added noise is about 2 r
            times that of the sample.
        iterations: iterations at each step; Langevin steps, at least 1.

    Raises:
        PlanError: a value outside these ranges.
    """

    traits = Traits(sets_sample="always", needs_noise_levels=True)

    snr: float = 0.16
    iterations: int = 1

    def __post_init__(self) -> None:
        is_ratio = is_number(self.snr) and 0 < self.snr < float("inf")
        require(is_ratio, self, "snr", "finite and above 0")
        is_number_of = is_count(self.iterations) and self.iterations >= 1
        require(is_number_of, self, "iterations", "an integer, 1 or more")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return every step but the sampler's last: noise that is added there stays in the image."""
        return tuple(range(schedule.num_steps - schedule.calls_per_step))

    def check(self, context: CorrectorContext) -> None:
        """Check that the calls after the selected steps are not pure noise."""
        self.required(context)

    def required(self, context: CorrectorContext) -> NoiseLevels:
        """Return the noise levels, with some signal at the calls after the selected steps.

        Raises:
            PlanError: they are not known, or there is none.
        """
        ahead = [step + context.schedule.calls_per_step for step in context.steps]
        return required(context.levels, self, ahead)

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _Diffusion(self, context)


class _Diffusion(Corrector):
    """Langevin on one run; no state passes from step to step."""

    def __init__(self, choices: Langevin, context: CorrectorContext) -> None:
        super().__init__(context)
        self._choices = choices
        self._levels = choices.required(context)

    def at_step(self, view: StepView) -> Correction:
        wide = torch.promote_types(view.sample.dtype, torch.float32)
        x = view.preview(view.prediction).to(wide)
        ahead = view.step + self.context.schedule.calls_per_step  # which receives what this step returns
        alpha, b = self._alpha(ahead), self._levels.noise[ahead]
        residuals: list[tuple[Rows, Tensor]] = []
        for k in range(self._choices.iterations):
            prediction, _ = view.evaluate(x, step=ahead)
            g = -self._levels.epsilon(x, prediction, ahead) / b
            moved = langevin_step(x, g, view.noise(k).to(wide), snr=self._choices.snr, alpha=alpha)
            residuals.append((None, residual(moved, x)))
            x = moved
        return Correction(prediction=view.prediction, prev_sample=x, residuals=residuals)

    def _alpha(self, ahead: int) -> float:
        signal = self._levels.signal
        after = ahead + self.context.schedule.calls_per_step
        return (signal[ahead] / (signal[after] if after < len(signal) else 1.0)) ** 2


def langevin_step(x: Tensor, g: Tensor, z: Tensor, *, snr: float, alpha: float) -> Tensor:
    """Return x + ε_i g + sqrt(2 ε_i) z, one iteration; all `(B, …)`, each sample with its own ε_i."""
    step_size = 2 * alpha * (snr * _norm(z) / _norm(g)) ** 2
    return x + step_size * g + torch.sqrt(2 * step_size) * z


def _norm(batch: Tensor) -> Tensor:
    """Return ‖·‖₂ of each sample, `(B, 1, …)`."""
    norms = torch.linalg.vector_norm(batch.flatten(1), dim=1)
    return norms.reshape(-1, *([1] * (batch.ndim - 1)))
