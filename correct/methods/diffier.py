"""DiffIER: gradient steps on the guided prediction, towards fresh noise.

    symbol      here                meaning
    ε_cfg       eps                 the guided prediction as ε; after k iterations, ε_cfg^(k)
    ε_k         noise               fresh standard normal noise of iteration k = 0, 1, …
    L_k         loss                ‖ε_cfg^(k) - ε_k‖², the mean over a sample's elements
    η           step_size           step size, 5e-2
    τ           threshold           1e-3
    K           max_iterations      most iterations

Iteration (Algorithm 1, lines 8 to 10): draw ε_k; L_k = ‖ε_cfg^(k) - ε_k‖²; one step of gradient descent,
ε_cfg^(k+1) = ε_cfg^(k) - η ∇L = (1 - 2η) ε_cfg^(k) + 2η ε_k. The gradient of the squared norm is
2 (ε_cfg - ε_k), in closed form: no call of the network.

Each iteration forgets: after k of them (1 - 2η)^k of ε_cfg is left, 0.9^k by default, and the rest is random
noise. With a fresh ε_k, L fluctuates by about sqrt(8 / d) for d elements, which for images is far above τ, so
mostly K decides when to stop. The fraction that is left is reported for each sample, in
`StepStats.notes["kept"]`.

Source: "DiffIER: Optimizing Diffusion Models with Iterative Error Reduction" (arXiv 2508.13628), eq. 12,
Algorithm 1, and appendix A.2 for η and τ. Deviations, where the paper leaves a choice open or contradicts
itself:

- Line 10 prints `+ η ∇L`; the text says gradient descent, and plus diverges. The sign is minus.
- "not convergence" is taken to mean |L_k - L_{k-1}| ≥ τ, from the second iteration on, with L as a mean per
  element, so that τ means the same at every resolution; decided for each sample alone, after its step is
  made, so that an image does not depend on its neighbours. A sample that has converged stays as it is.
- The paper has no cap; with fresh noise the loop need not end. K is 8 here.
- Networks that predict v or x_0 are corrected in ε, and their prediction is computed from that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import Correction, Corrector, CorrectorContext, Noise, Rows, StepView
from errata.correct.device_sync import is_free_to_read
from errata.correct.noise_levels import required
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.correct.validation import is_count, is_number, require
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule


@register_method
@dataclass(frozen=True, kw_only=True)
class DiffIER(StoredDataclass):
    """Iterative error reduction of guided predictions, at every step; no evaluation.

    Attributes:
        step_size: step size per iteration; η in (0, 0.5]. At 0.5 one iteration leaves nothing of the
            prediction.
        threshold: an image is done when its loss changes by less than this; τ, at least 0.
        max_iterations: most iterations at each step; K, at least 1.

    Raises:
        PlanError: a value outside these ranges.
    """

    traits = Traits(changes_prediction=True, needs_noise_levels=True, needs_guidance=True)

    step_size: float = 5e-2
    threshold: float = 1e-3
    max_iterations: int = 8

    def __post_init__(self) -> None:
        in_range = is_number(self.step_size) and 0 < self.step_size <= 0.5
        require(in_range, self, "step_size", "in (0, 0.5]")
        is_bound = is_number(self.threshold) and 0 <= self.threshold < float("inf")
        require(is_bound, self, "threshold", "finite, 0 or more")
        is_cap = is_count(self.max_iterations) and self.max_iterations >= 1
        require(is_cap, self, "max_iterations", "an integer, 1 or more")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return every step: it needs only the prediction."""
        return tuple(range(schedule.num_steps))

    def check(self, context: CorrectorContext) -> None:
        """Check that no step is pure noise."""
        required(context.levels, self, context.steps)

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _Descent(self, context)


class _Descent(Corrector):
    """DiffIER on one run; no state passes from step to step."""

    def __init__(self, choices: DiffIER, context: CorrectorContext) -> None:
        super().__init__(context)
        self._choices = choices
        self._levels = required(context.levels, choices, context.steps)

    def at_step(self, view: StepView) -> Correction:
        if not view.is_guided:
            raise PlanError(
                f"DiffIER corrects guided predictions, but step {view.step} was not guided; use a "
                "guidance_scale above 1, or correct with IEC"
            )
        wide = torch.promote_types(view.prediction.dtype, torch.float32)
        x = view.sample.to(wide)
        eps = self._levels.epsilon(x, view.prediction, view.step)
        eps, residuals, iterations = descend(eps, view.noise, self._choices)
        prediction = self._levels.prediction(x, eps, view.step)
        return Correction(
            prediction=prediction.to(view.prediction.dtype),
            residuals=residuals,
            notes={"kept": (1 - 2 * self._choices.step_size) ** iterations},
        )


def descend(eps: Tensor, noise: Noise, choices: DiffIER) -> tuple[Tensor, list[tuple[Rows, Tensor]], Tensor]:
    """Run the loop from `eps` `(B, …)`, float32 or wider; `noise` as in `StepView`.

    Samples that have converged are masked, not taken out of the batch, so that an accelerator can queue all
    iterations without waiting.

    Returns:
        ε after the last iteration of each sample; for each iteration which samples it moved, and
        |L_k - L_{k-1}| of each (L_0 at first), as in `Correction.residuals`; the number of iterations of each
        sample, `(B,)`, in the type of `eps`.
    """
    moves = torch.ones(len(eps), dtype=torch.bool, device=eps.device)
    previous = torch.zeros(len(eps), dtype=eps.dtype, device=eps.device)
    residuals: list[tuple[Rows, Tensor]] = []
    iterations = torch.zeros_like(previous)
    for k in range(choices.max_iterations):
        difference = eps - noise(k).to(eps.dtype)
        loss = difference.square().flatten(1).mean(dim=1)
        eps = torch.where(_spread(moves, eps), eps - choices.step_size * 2 * difference, eps)
        change = (loss - previous).abs()
        residuals.append((None if k == 0 else moves, change))
        iterations += moves
        if k > 0:
            moves = moves & ~(change < choices.threshold)
        previous = loss
        if is_free_to_read(moves) and not moves.any():
            break
    return eps, residuals, iterations


def _spread(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.reshape(-1, *([1] * (like.ndim - 1)))
