"""Iterative Error Correction: refine x_{t-1} by evaluating the network where it landed.

The symbols, with the paper's equation numbers:

    symbol      here              meaning
    x_t         view.sample       the sample that the step starts from
    ε           prediction        ε(x_t, t), guided where the pipeline guides
    y, x^(k)    y                 k-th iterate of x_{t-1}; y^(0) is the plain step (Eq. 9)
    ε(x^(k),t)  eps_y             the network at the iterate, same t
    A x_t + B ε preview(ε)        the scheduler's step from x_t; for DDIM A = sqrt(ᾱ_{t-1}/ᾱ_t) and
                                  B = sqrt(1-ᾱ_{t-1}) - sqrt(ᾱ_{t-1}(1-ᾱ_t)/ᾱ_t)
    λ           step_size         damping; [0.1, 0.7] contracts in the paper
    K           iterations        most refinements
    τ           tolerance         stop when ‖x^(k+1) - x^(k)‖₂ ≤ τ

Update (Eq. 10): x^(k+1) = x^(k) + λ (A x_t + B ε(x^(k), t) - x^(k)).

Where the step is linear in ε, x^(k) is the step taken with ε^(k), where ε^(0) = ε and
ε^(k+1) = (1-λ) ε^(k) + λ ε(x^(k), t). That blended prediction is what the scheduler's own step receives,
once: it is what enters a multistep history, so later steps extrapolate from corrected predictions. Where the
step is not linear, the scheduler receives the blended prediction all the same, and the sample that it
returns is replaced by x^(K).

Source: "Iterative Error Correction", Eq. 9 and 10. Deviations: the residual is per sample, not over the
batch, so an image does not depend on its neighbours; noise is held fixed across iterations, so that there is
a fixed point at η > 0 too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from errata.compress.recipes.schedule import CacheSchedule
from errata.correct.config_json import fields_of
from errata.correct.corrector import Correction, Corrector, Rows, StepView, put, take
from errata.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class IEC:
    """Iterative Error Correction, at full steps.

    Attributes:
        step_size: λ, in (0, 1].
        iterations: K, at least 1: the most extra evaluations of a sample.
        tolerance: τ, at least 0: a sample whose iterate moves no further than this leaves the batch.
        cache_after: what the cached steps that follow read: "replace", the feature of the last evaluation;
            "keep", that of x_t. Without a cache it does nothing.

    Raises:
        PlanError: a value outside these ranges.
    """

    step_size: float = 0.5
    iterations: int = 1
    tolerance: float = 1e-5
    cache_after: Literal["replace", "keep"] = "replace"

    def __post_init__(self) -> None:
        _require(
            _is_number(self.step_size) and 0 < self.step_size <= 1, "step_size", self.step_size, "in (0, 1]"
        )
        is_count = isinstance(self.iterations, int) and not isinstance(self.iterations, bool)
        _require(is_count and self.iterations >= 1, "iterations", self.iterations, "an integer, 1 or more")
        is_bound = _is_number(self.tolerance) and 0 <= self.tolerance < float("inf")
        _require(is_bound, "tolerance", self.tolerance, "finite, 0 or more")
        _require(
            self.cache_after in ("replace", "keep"), "cache_after", self.cache_after, '"replace" or "keep"'
        )

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """The full steps: a cached one has no feature of its own to correct."""
        return schedule.full_steps

    def corrector(self) -> Corrector:
        """See `Method.corrector`."""
        return _Refinement(self)

    def to_json(self) -> dict[str, Any]:
        """See `Method.to_json`."""
        return {"type": "IEC", "version": 1, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> IEC:
        """Inverse of `to_json`.

        Raises:
            PlanError: another type or version, a missing or an unknown key, a value out of range.
        """
        return cls(**fields_of(cls, value, version=1))


class _Refinement(Corrector):
    """IEC on one run; every step stands alone."""

    def __init__(self, choices: IEC) -> None:
        self._choices = choices

    def at_step(self, view: StepView) -> Correction:
        choices = self._choices
        return iterate(
            view.prediction,
            view.preview,
            view.evaluate,
            step_size=choices.step_size,
            iterations=choices.iterations,
            tolerance=choices.tolerance,
            is_linear=view.is_linear,
            replaces_feature=choices.cache_after == "replace",
        )


def iterate(
    prediction: Tensor,
    preview: Callable[[Tensor], Tensor],
    evaluate: Callable[[Tensor, Rows], tuple[Tensor, Tensor | None]],
    *,
    step_size: float,
    iterations: int,
    tolerance: float,
    is_linear: bool = False,
    replaces_feature: bool = True,
) -> Correction:
    """IEC at one step, from the plain prediction; `preview` and `evaluate` as in `StepView`.

    Iterates are accumulated in float32 or wider. On an accelerator the stopping rule waits for the device
    after every iteration but the last, so not at all where there is one.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    y = preview(prediction).to(wide)
    eps, eps_y = prediction.to(wide), prediction
    feature: Tensor | None = None
    rows: Rows = None
    residuals: list[tuple[Rows, Tensor]] = []
    for k in range(iterations):
        eps_rows, feature = evaluate(y, rows)
        eps_y = put(eps_y, rows, eps_rows)  # rows that left keep their latest, which no longer matters
        y_rows = refine(take(y, rows), take(preview(eps_y), rows).to(wide), step_size)
        residuals.append((rows, residual(y_rows, take(y, rows))))
        y = put(y, rows, y_rows)
        eps = put(eps, rows, refine(take(eps, rows), eps_rows.to(wide), step_size))
        if k + 1 < iterations:
            rows = unconverged(*residuals[-1], tolerance)
            if rows is not None and len(rows) == 0:
                break
    return Correction(
        prediction=eps.to(prediction.dtype),
        prev_sample=None if is_linear else y,
        feature=feature if replaces_feature else None,
        residuals=residuals,
    )


def refine(value: Tensor, target: Tensor, step_size: float) -> Tensor:
    """`value + λ (target - value)`: Eq. 10 for an iterate, and the blend for a prediction."""
    return value + step_size * (target - value)


def residual(new: Tensor, old: Tensor) -> Tensor:
    """‖new - old‖₂ of each sample, `(B,)`."""
    return torch.linalg.vector_norm((new - old).flatten(1), dim=1)


def unconverged(rows: Rows, residuals: Tensor, tolerance: float) -> Rows:
    """Of `rows`, those whose residual exceeds `tolerance`; each is decided alone. Waits for the device."""
    values = residuals.tolist()
    kept = [index for index, value in enumerate(values) if not value <= tolerance]  # NaN stays
    if len(kept) == len(values):
        return rows
    chosen = torch.tensor(kept, dtype=torch.int64, device=residuals.device)
    return chosen if rows is None else rows[chosen]


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise PlanError(f"IEC({name}={value!r}): {name} must be {allowed}; leave it out for the default")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
