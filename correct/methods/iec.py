"""Iterative Error Correction: refine x_{t-1} by evaluating the network at x_{t-1} itself.

The symbols, with the paper's equation numbers:

    symbol      here              meaning
    x_t         view.sample       the sample that the step starts from
    ε           prediction        ε(x_t, t), guided where the pipeline guides
    y, x^(k)    y                 k-th iterate of x_{t-1}; y^(0) is the plain step (Eq. 9)
    ε(x^(k),t)  eps_y, eps_rows   the network at the iterate, same t; where it predicts v, a v + b x^(k), and
                                  where x_0, (x^(k) - a x_0) / b; for a² + b² = 1, else see `NoiseLevels`
    A x_t + B ε preview(ε)        the scheduler's step from x_t; for DDIM A = sqrt(ᾱ_{t-1}/ᾱ_t) and
                                  B = sqrt(1-ᾱ_{t-1}) - sqrt(ᾱ_{t-1}(1-ᾱ_t)/ᾱ_t)
    λ           step_size         damping; [0.1, 0.7] contracts in the paper
    K           iterations        most refinements
    τ           tolerance         stop when ‖x^(k+1) - x^(k)‖₂ ≤ τ; tested between iterations, so K = 1 never
                                  stops early

Update (Eq. 10): x^(k+1) = x^(k) + λ (A x_t + B ε(x^(k), t) - x^(k)).

Where the step is linear in ε, x^(k) is the step taken with ε^(k), where ε^(0) = ε and
ε^(k+1) = (1-λ) ε^(k) + λ ε(x^(k), t). The scheduler's own step receives that blended prediction, once. So it
enters a multistep history, and later steps extrapolate from corrected predictions. Where the step is not
linear, the scheduler receives the blended prediction too, and x^(K) replaces the sample that it returns.

Where the network predicts v or x_0, the blend is made of predictions for x_t: the v or x_0 that means
ε(x^(k), t) at x_t, which is not the one that the network made at x^(k). So x^(K) does not depend on how the
denoiser is parameterized.

A sample whose residual grows from one iteration to the next keeps the iterate that it had and leaves the
batch (the paper has no such guard). It counts as diverged if the residual has grown beyond its first value.
The residuals of a quantized network fall to the size of its rounding errors, and go up and down there.

Source: "Iterative Error Correction", Eq. 9 and 10. Deviations: the residual is per sample, not over the
batch, so an image does not depend on its neighbours. Noise is held fixed across iterations, so that there is
a fixed point at η > 0 too. Where the network predicts v or x_0 and ε cannot be computed from it (unknown
noise levels, or a step from pure noise), its predictions are blended as they are. `IEC.official()` does what
the authors' code does, and says where that differs from the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.correct.config_json import StoredDataclass
from errata.correct.corrector import (
    Correction,
    Corrector,
    CorrectorContext,
    Evaluate,
    Features,
    Preview,
    Rows,
    StepView,
    put,
    take,
)
from errata.correct.device_sync import is_free_to_read
from errata.correct.noise_levels import NoiseLevels
from errata.correct.registry import register_method
from errata.correct.traits import Traits
from errata.correct.validation import is_count, is_number, require
from errata.errors import PlanError
from errata.runtime.schedule import CacheSchedule

# Relative to the sample: by how much two orders of float32 sums differ. A residual below it is noise, and
# its growth means nothing.
_ROUNDING = 1e-6


@register_method
@dataclass(frozen=True, kw_only=True)
class IEC(StoredDataclass):
    """Iterative Error Correction, at full steps.

    Attributes:
        step_size: step size per iteration; λ in (0, 1], one number, or one for each iteration.
        iterations: iterations at each step; K, at least 1, the most extra evaluations of a sample.
        tolerance: an image is done when an iteration moves it no further than this; τ, at least 0. It acts
            from the second iteration on: one iteration is always taken, and K = 1 never stops early.
        cache_after: which feature the following cached steps read; "replace", that of the last evaluation,
            or "keep", that of x_t. Without a cache it has no effect.
        stopping: rule by which an image stops; "per_sample", as above, or "official", as in the authors'
            code, see `official`.
        guard: stop an image whose residual grows; it keeps the iterate that it had. It acts from the second
            iteration on, and with "per_sample" only.

    Raises:
        PlanError: a value outside these ranges.
    """

    VERSION: ClassVar[int] = 2

    step_size: float | tuple[float, ...] = 0.5
    iterations: int = 1
    tolerance: float = 1e-5
    cache_after: Literal["replace", "keep"] = "replace"
    stopping: Literal["per_sample", "official"] = "per_sample"
    guard: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.step_size, list):  # as JSON has it
            object.__setattr__(self, "step_size", tuple(self.step_size))
        require(
            is_count(self.iterations) and self.iterations >= 1, self, "iterations", "an integer, 1 or more"
        )
        sizes = self.step_size if isinstance(self.step_size, tuple) else (self.step_size,)
        in_range = all(is_number(size) and 0 < size <= 1 for size in sizes)
        fits = not isinstance(self.step_size, tuple) or len(sizes) == self.iterations
        require(in_range and fits, self, "step_size", "in (0, 1], one number or one for each iteration")
        is_bound = is_number(self.tolerance) and 0 <= self.tolerance < float("inf")
        require(is_bound, self, "tolerance", "finite, 0 or more")
        require(self.cache_after in ("replace", "keep"), self, "cache_after", '"replace" or "keep"')
        rules = ("per_sample", "official")
        require(self.stopping in rules, self, "stopping", '"per_sample" or "official"')
        require(isinstance(self.guard, bool), self, "guard", "true or false")

    @property
    def traits(self) -> Traits:
        """What it does: in a linear step, the blended prediction is all that is needed."""
        is_per_image = self.stopping == "per_sample"
        return Traits(changes_prediction=True, sets_sample="if_nonlinear", per_image=is_per_image)

    @classmethod
    def paper(cls) -> IEC:
        """Return the paper's choices: λ = 0.5, K = 1, τ = 1e-5; the defaults.

        Source: "Iterative Error Correction", section 3.2, last paragraph.
        """
        return cls(step_size=0.5, iterations=1, tolerance=1e-5)

    @classmethod
    def official(cls, kind: Literal["pixel", "latent"] = "pixel") -> IEC:
        """Return what the authors' code does, which differs from their paper.

        - The residual is ‖new - old‖ / (‖old‖ + 1e-6) over the whole batch, so an image depends on its
          neighbours. It is tested before the update, so the last evaluation of a converged batch is thrown
          away; its feature stays in the cache.
        - λ is 0.5 to the power of the iteration: one refinement at 0.5 for pixels, two at 1 and 0.5 for
          latents.
        - There is no guard against divergence.

        Deviation: at η > 0 the code draws new noise in each refinement; here it is held fixed.

        Raises:
            PlanError: another kind.
        """
        known = {"pixel": (0.5,), "latent": (1.0, 0.5)}
        if kind not in known:
            raise PlanError(f'IEC.official({kind!r}): kind must be "pixel" or "latent"')
        sizes = known[kind]
        return cls(step_size=sizes, iterations=len(sizes), stopping="official")

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return the full steps: a cached one has no feature of its own to correct."""
        return schedule.full_steps

    def check(self, context: CorrectorContext) -> None:
        """Accept every scheduler."""

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""
        return _Refinement(self, context)

    def to_json(self) -> dict[str, Any]:
        """Return its choices as plain JSON."""
        sizes = list(self.step_size) if isinstance(self.step_size, tuple) else self.step_size
        return {**super().to_json(), "step_size": sizes}


class _Refinement(Corrector):
    """IEC on one run; no state passes from step to step."""

    def __init__(self, choices: IEC, context: CorrectorContext) -> None:
        super().__init__(context)
        self._choices = choices

    def at_step(self, view: StepView) -> Correction:
        levels, evaluate = self.context.levels, view.evaluate
        if levels is not None and levels.prediction_type != "epsilon" and levels.signal[view.step] > 0:
            evaluate = _meant_at_start(view, levels)
        return iterate(view.prediction, view.preview, evaluate, self._choices, is_linear=view.is_linear)


def _meant_at_start(view: StepView, levels: NoiseLevels) -> Evaluate:
    """Return `view.evaluate`, with predictions that mean for x_t the ε that the network found at y."""

    def evaluate(samples: Tensor, rows: Rows = None, *, step: int | None = None) -> tuple[Tensor, Features]:
        prediction, features = view.evaluate(samples, rows, step=step)
        wide = torch.promote_types(prediction.dtype, samples.dtype)
        eps_y = levels.epsilon(take(samples, rows).to(wide), prediction, view.step)
        return levels.prediction(take(view.sample, rows).to(wide), eps_y, view.step), features

    return evaluate


def plain_iec(
    x_t: Tensor,
    eps: Tensor,
    step: Callable[[Tensor, Tensor], Tensor],
    denoise: Callable[[Tensor], Tensor],
    *,
    step_size: float = 0.5,
    iterations: int = 1,
) -> Tensor:
    """Return x_{t-1} as the paper has it; sampling runs `iterate` below, which is tested against this.

    `iterate` adds what the paper leaves out: a residual and a stop per sample, the guard, half precision, the
    cached features, and the prediction that a multistep scheduler has to remember.

    Args:
        x_t: the sample that the step starts from, `(B, …)`.
        eps: ε(x_t, t).
        step: the scheduler's step, `step(x_t, ε)` = A x_t + B ε for DDIM.
        denoise: the network at the timestep of x_t, `denoise(x)` = ε(x, t).
        step_size: λ.
        iterations: K.
    """
    x = step(x_t, eps)  # Eq. 9
    for _ in range(iterations):
        eps = denoise(x)
        x = x + step_size * (step(x_t, eps) - x)  # Eq. 10
    return x


def iterate(
    prediction: Tensor, preview: Preview, evaluate: Evaluate, choices: IEC, *, is_linear: bool = False
) -> Correction:
    """Return IEC's correction of one step; `preview` and `evaluate` as in `StepView`.

    Iterates are accumulated in float32 or wider. On an accelerator the stopping rule waits for the device
    once, after the first of several iterations: samples that have left by then cost nothing more. Samples
    that leave later are still evaluated, and stay as they are.
    """
    # The plain step: ε^(0) = ε and x^(0) = y (Eq. 9).
    wide = torch.promote_types(prediction.dtype, torch.float32)
    iterates = _Iterates(prediction.to(wide), preview(prediction.to(wide)))
    features: Features = ()
    rows: Rows = None
    for k in range(choices.iterations):
        step_size = choices.step_size[k] if isinstance(choices.step_size, tuple) else choices.step_size
        # Evaluate the network at the iterates: ε(x^(k), t).
        eps_rows, evaluated = evaluate(iterates.y, rows)
        features = iterates.kept(features, evaluated)
        # Move them: x^(k+1) = x^(k) + λ (A x_t + B ε(x^(k), t) - x^(k)) (Eq. 10).
        y_rows = iterates.refined(preview, eps_rows, rows, step_size)
        iterates.accept(y_rows, eps_rows, rows, step_size, choices)
        # Samples that have converged, or that the guard stopped, leave the batch.
        if k + 1 < choices.iterations and (k == 0 or is_free_to_read(iterates.y)):
            rows = iterates.remaining(rows)
            if rows is not None and len(rows) == 0:
                break
    # The scheduler receives ε^(K); x^(K) itself is needed only where its step is not linear.
    return Correction(
        prediction=iterates.eps.to(prediction.dtype),
        prev_sample=None if is_linear else iterates.y,
        features=features if features and choices.cache_after == "replace" else None,
        residuals=iterates.residuals,
        diverged=iterates.diverged if choices.iterations > 1 else None,
        notes={"guarded": iterates.guarded.to(wide)} if choices.iterations > 1 else {},
    )


class _Iterates:
    """y = x^(k) and eps = ε^(k) of all samples, how far each moved last, and which have left."""

    def __init__(self, prediction: Tensor, y: Tensor) -> None:
        wide = torch.promote_types(prediction.dtype, torch.float32)
        self.y, self.eps = y.to(wide), prediction.to(wide)
        self.residuals: list[tuple[Rows, Tensor]] = []
        self.diverged = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        self.guarded = self.diverged
        self._eps_y = self.eps  # the network at the iterates; that of rows that left is never read
        self._left = torch.zeros_like(self.diverged)
        self._all_remain = True  # none of the evaluated rows has left
        self._moved = torch.full((len(y),), float("inf"), dtype=wide, device=y.device)
        self._first = self._moved

    def kept(self, features: Features, evaluated: Features) -> Features:
        """Return the features of the evaluation; samples that had left before it keep theirs."""
        if self._all_remain:
            return evaluated
        # With guidance in one batch, a sample has several rows.
        left = [self._left.repeat(len(new) // len(self._left)) for new in evaluated]
        return tuple(
            torch.where(_spread(mask, new), old, new)
            for mask, old, new in zip(left, features, evaluated, strict=True)
        )

    def refined(self, preview: Preview, eps_rows: Tensor, rows: Rows, step_size: float) -> Tensor:
        """Return the next iterate of the rows, given the network at the present one."""
        self._eps_y = put(self._eps_y, rows, eps_rows.to(self._eps_y.dtype))
        return refine(take(self.y, rows), take(preview(self._eps_y), rows).to(self.y.dtype), step_size)

    def accept(self, y_rows: Tensor, eps_rows: Tensor, rows: Rows, step_size: float, choices: IEC) -> None:
        """Move the rows on, except those that had left, and decide which leave now."""
        # How far each would move, the residual.
        y, eps, left = take(self.y, rows), take(self.eps, rows), take(self._left, rows)
        moved = residual(y_rows, y)
        self._note(rows, moved, left)
        # Which rows keep the old iterate, and which leave.
        if choices.stopping == "official":
            change = torch.linalg.vector_norm(y_rows - y) / (torch.linalg.vector_norm(y) + 1e-6)
            stays = leaves = left | (change < choices.tolerance)
        else:
            stopped = self._grew(y, moved / step_size, moved, rows) & choices.guard & ~left
            self.guarded = put(self.guarded, rows, take(self.guarded, rows) | stopped)
            stays = left | stopped
            leaves = stays | (moved <= choices.tolerance)  # NaN stays in the batch, and is reported
            has_diverged = stopped & (moved / step_size > take(self._first, rows))
            self.diverged = put(self.diverged, rows, take(self.diverged, rows) | has_diverged)
        # Remember the move, to see growth, and take it.
        self._moved = put(self._moved, rows, moved / step_size)
        self._first = torch.where(self._first.isinf(), self._moved, self._first)
        self._left = put(self._left, rows, leaves)
        self._all_remain = False
        refined = refine(eps, eps_rows.to(eps.dtype), step_size)
        self.y = put(self.y, rows, torch.where(_spread(stays, y), y, y_rows))
        self.eps = put(self.eps, rows, torch.where(_spread(stays, eps), eps, refined))

    def remaining(self, rows: Rows) -> Rows:
        """Return those of `rows` that have not left; wait for the device."""
        self._all_remain = True
        chosen = (~take(self._left, rows)).nonzero().flatten()
        if len(chosen) == len(self._left if rows is None else rows):
            return rows
        return chosen if rows is None else rows[chosen]

    def _grew(self, y: Tensor, rate: Tensor, moved: Tensor, rows: Rows) -> Tensor:
        """Return which samples would move further than before, `(rows,)`, by more than rounding."""
        size = torch.linalg.vector_norm(y.flatten(1), dim=1)
        return (rate > take(self._moved, rows)) & (moved > _ROUNDING * size)

    def _note(self, rows: Rows, moved: Tensor, left: Tensor) -> None:
        if self._all_remain:
            self.residuals.append((rows, moved))
        else:
            refined = put(torch.zeros_like(self._left), rows, ~left)
            self.residuals.append((refined, put(torch.zeros_like(self._moved), rows, moved)))


def refine(value: Tensor, target: Tensor, step_size: float) -> Tensor:
    """Return `value + λ (target - value)`: Eq. 10 for an iterate, the blend for a prediction."""
    return value + step_size * (target - value)


def residual(new: Tensor, old: Tensor) -> Tensor:
    """Return ‖new - old‖₂ of each sample, `(B,)`."""
    return torch.linalg.vector_norm((new - old).flatten(1), dim=1)


def _spread(per_sample: Tensor, like: Tensor) -> Tensor:
    return per_sample.reshape(-1, *([1] * (like.ndim - 1)))
