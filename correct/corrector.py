"""The contract between a correction method and the sampling run that it corrects.

A method (`errata.correct.IEC`, …) is a frozen dataclass. `Method.corrector()` makes a `Corrector`, which
lives for one run and may keep state between steps. A corrector can act at two places: before a denoiser
call, where it decides how the call is made, and between network and scheduler, where it changes what the
scheduler gets. If it overrides neither, nothing changes.

A corrector needs only two things of a denoiser: a full call, which returns the feature, and a cached call,
which takes one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from errata.correct.noise_levels import NoiseLevels
from errata.runtime.run import CallView, Evaluation
from errata.runtime.schedule import CacheSchedule, StepKind

__all__ = [
    "CallView",
    "Correction",
    "Corrector",
    "CorrectorContext",
    "Evaluate",
    "Evaluation",
    "Features",
    "Method",
    "Noise",
    "Preview",
    "Rows",
    "StepView",
    "put",
    "take",
]

Rows = Tensor | None
"""Samples of a batch: their indices `(rows,)`, int64, sorted; None means all of them."""

Features = tuple[Tensor, ...]
"""One for each denoiser call of a sampler step: one, or two where guidance takes two calls; none without a
cache."""


class Preview(Protocol):
    """A look at where a step leads, which changes nothing."""

    def __call__(self, prediction: Tensor, /) -> Tensor:
        """Return the sample that the scheduler would return for a prediction, with the noise held fixed."""


class Evaluate(Protocol):
    """A full evaluation, counted as extra; the cache stays as it is."""

    def __call__(
        self, samples: Tensor, rows: Rows = None, *, step: int | None = None
    ) -> tuple[Tensor, Features]:
        """Return the guided prediction of some rows at other samples, and features.

        Args:
            samples: `(B, …)`, as the pipeline would hold them.
            rows: which of them to evaluate.
            step: a denoiser call at which to evaluate, with its timestep and scales; None is this one.

        Returns:
            Predictions `(rows, …)`, float32 or wider; and features of the whole batch, in which rows that
            were not evaluated keep theirs.
        """


class Noise(Protocol):
    """Random numbers that are independent of the pipeline's."""

    def __call__(self, draw: int, /) -> Tensor:
        """Return standard normal noise, shaped like the sample: draw 0, 1, … of this step.

        Every image has its own, whatever else is in its batch. It is derived from the image's generator,
        whose state does not change.
        """


@dataclass(frozen=True, kw_only=True)
class CorrectorContext:
    """Where a corrector works; known before sampling begins.

    Attributes:
        steps: denoiser calls that the plan selects and the method serves, sorted; either all calls of a
            sampling step or none.
        schedule: which calls are full and which are cached.
        timesteps: of every call.
        levels: noise levels of the samples at every call; None if they are not known for the scheduler.
        refreshed: cached calls that the plan makes in full, sorted.
        keeps_samples: whether a change of the sample that a step returns reaches the end, see
            `errata.correct.step_rule.keeps_samples`.
    """

    steps: tuple[int, ...]
    schedule: CacheSchedule
    timesteps: tuple[float, ...]
    levels: NoiseLevels | None
    refreshed: tuple[int, ...] = ()
    keeps_samples: bool = True


@dataclass(frozen=True, kw_only=True)
class StepView:
    """What a corrector sees of one sampling step, and what it can call.

    Attributes:
        step: index of the denoiser call; of the first one where a sampling step takes several.
        kind: how it was evaluated.
        sample: x_t, `(B, C, H, W)`, as the pipeline holds it (not scaled for the network).
        prediction: what the pipeline passes to the scheduler (guided), like `sample`.
        features: what the cache holds.
        is_linear: whether the scheduler's step is linear in the prediction.
        is_guided: whether the prediction was made of two, by guidance.
        preview: see `Preview`.
        evaluate: see `Evaluate`.
        noise: see `Noise`.
    """

    step: int
    kind: StepKind
    sample: Tensor
    prediction: Tensor
    features: Features
    is_linear: bool
    is_guided: bool
    preview: Preview
    evaluate: Evaluate
    noise: Noise


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What a corrector changes at a step.

    Attributes:
        prediction: handed to the scheduler's step in place of the pipeline's; enters a multistep history.
        prev_sample: replaces the sample that this step returns; None keeps it.
        shift: added to the sample that this step returns; shifts of several methods add up.
        features: replace what the cache holds; None keeps it.
        features_step: the call at which they were made, if not this one.
        residuals: for each iteration, the rows that it refined and the residual of each, `(rows,)`. If only
            the device knows which rows, a mask `(B,)`, bool, replaces their indices, with a number for each
            sample, `(B,)`.
        diverged: which samples kept an iterate because the next one moved further than the first did,
            `(B,)`, bool.
        notes: further numbers, one for each sample, `(B,)`, by name.
    """

    prediction: Tensor
    prev_sample: Tensor | None = None
    shift: Tensor | None = None
    features: Features | None = None
    features_step: int | None = None
    residuals: list[tuple[Rows, Tensor]] = field(default_factory=list)
    diverged: Tensor | None = None
    notes: Mapping[str, Tensor] = field(default_factory=dict)


class Corrector:
    """Corrects one run. The base class changes nothing.

    Attributes:
        context: where it works.
        remembers: how many features of full evaluations `before_call` sees.
        taps: steps at which `at_step` is called; those of the context, unless a subclass changes it.
    """

    remembers = 1

    def __init__(self, context: CorrectorContext) -> None:
        self.context = context
        self.taps: frozenset[int] = frozenset(context.steps)

    @property
    def setting(self) -> CorrectorContext:
        """The former name of `context`."""
        warnings.warn("Corrector.setting is now Corrector.context", DeprecationWarning, stacklevel=2)
        return self.context

    def before_call(self, view: CallView) -> Evaluation | None:
        """Return how to make a denoiser call, before it is made; None leaves it as it is."""
        return None

    def at_step(self, view: StepView) -> Correction | None:
        """Return what to change at a step, between network and scheduler; None leaves it as it is."""
        return None


class Method(Protocol):
    """A correction method: its choices, and which steps it can serve.

    It should also have an attribute `traits` (`errata.correct.Traits`), by which plans are checked. Without
    it a plan is refused where the check would be a guess.
    """

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Return the steps at which the method can act."""

    def check(self, context: CorrectorContext) -> None:
        """Check that the method works there, before sampling begins.

        Raises:
            PlanError: it does not; the message says why, and what would.
        """

    def corrector(self, context: CorrectorContext) -> Corrector:
        """Return a corrector for one run."""

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value with the keys `type` and `version`."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Method:
        """Return the method that `to_json` described."""


def take(batch: Tensor, rows: Rows) -> Tensor:
    """Return the rows of `batch`."""
    return batch if rows is None else batch.index_select(0, rows)


def put(batch: Tensor, rows: Rows, values: Tensor) -> Tensor:
    """Return `batch` with its rows replaced by `values`; a copy, unless all are replaced."""
    return values if rows is None else batch.index_copy(0, rows, values)
