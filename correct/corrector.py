"""The contract between a correction method and the sampling run that it corrects.

A method (`errata.correct.IEC`, …) is a frozen dataclass of choices. `Method.corrector()` turns it into a
`Corrector`, which lives for one run and may keep state between its steps. A corrector has one function per
place where a run can be tapped; a place that it does not override stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from errata.compress.recipes.schedule import CacheSchedule

Rows = Tensor | None
"""Samples of a batch: their indices `(rows,)`, int64, sorted; None means all of them."""


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a corrector sees of one sampling step, and what it can ask for.

    Attributes:
        step: index of the denoiser call.
        sample: x_t, `(B, C, H, W)`, as the pipeline holds it (not scaled for the network).
        prediction: what the pipeline passes to the scheduler (guided), like `sample`.
        feature: what the denoiser call left in the cache; None without a cache.
        is_linear: whether the scheduler's step is linear in the prediction.
        preview: the sample that the scheduler would return for a prediction, with the noise held fixed;
            `(B, …)` in and out. Changes nothing.
        evaluate: a full call at other samples `(B, …)`, at this step, for some rows. Returns the guided
            prediction of those rows, and the feature of the whole batch, where a row that was not evaluated
            keeps its former one (None without a cache). Counted as extra; the cache is left alone.
    """

    step: int
    sample: Tensor
    prediction: Tensor
    feature: Tensor | None
    is_linear: bool
    preview: Callable[[Tensor], Tensor]
    evaluate: Callable[[Tensor, Rows], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What becomes of a step.

    Attributes:
        prediction: handed to the scheduler's step in place of the pipeline's; enters a multistep history.
        prev_sample: replaces the sample that this step returns; None keeps it.
        feature: replaces the cached feature; None keeps it.
        residuals: for each iteration, the rows that it refined and the residual of each, `(rows,)`.
    """

    prediction: Tensor
    prev_sample: Tensor | None = None
    feature: Tensor | None = None
    residuals: list[tuple[Rows, Tensor]] = field(default_factory=list)


class Corrector:
    """Corrects one run. The base class changes nothing."""

    def at_step(self, view: StepView) -> Correction | None:
        """Called at every selected step, between network and scheduler; None leaves the step as it is."""
        return None


class Method(Protocol):
    """A correction method: its choices, and which steps it can serve."""

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Steps at which the method can do anything."""

    def corrector(self) -> Corrector:
        """A corrector for one run."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value with the keys `type` and `version`."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Method:
        """Inverse of `to_json`."""


def take(batch: Tensor, rows: Rows) -> Tensor:
    """The rows of `batch`."""
    return batch if rows is None else batch.index_select(0, rows)


def put(batch: Tensor, rows: Rows, values: Tensor) -> Tensor:
    """`batch` with its rows replaced by `values`; a copy unless all are."""
    return values if rows is None else batch.index_copy(0, rows, values)
