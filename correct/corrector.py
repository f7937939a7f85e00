"""The contract between a correction method and the sampling run that it corrects.

A method (`errata.correct.IEC`, …) is a frozen dataclass of choices. `Method.corrector()` turns it into a
`Corrector`, which lives for one run and may keep state between its steps. A corrector has one function per
place where a run can be tapped: before a denoiser call, where it can decide how the call is made, and between
network and scheduler, where it can change what the scheduler gets. A place that it does not override stays
as it is.

All that a corrector asks of a denoiser is a full call, which returns the feature, and a cached call, which
takes one.
"""

from __future__ import annotations

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
    """A look ahead that changes nothing."""

    def __call__(self, prediction: Tensor, /) -> Tensor:
        """The sample that the scheduler would return for a prediction, with the noise held fixed."""


class Evaluate(Protocol):
    """A full evaluation, counted as extra; the cache is left alone."""

    def __call__(
        self, samples: Tensor, rows: Rows = None, *, step: int | None = None
    ) -> tuple[Tensor, Features]:
        """The guided prediction of some rows at other samples, and features.

        Args:
            samples: `(B, …)`, as the pipeline would hold them.
            rows: which of them to evaluate.
            step: a denoiser call at which to evaluate, with its timestep and scales; None is this one.

        Returns:
            Predictions `(rows, …)`, float32 or wider; and features of the whole batch, where a row that was
            not evaluated keeps the one that it had before.
        """


class Noise(Protocol):
    """Random numbers that are no part of the pipeline's own."""

    def __call__(self, draw: int, /) -> Tensor:
        """Standard normal, shaped like the sample; draw 0, 1, … of this step.

        Every image has its own, whoever its neighbours in the batch are, derived from its generator, whose
        state stays as it is.
        """


@dataclass(frozen=True, kw_only=True)
class CorrectorContext:
    """Where a corrector works; known before anything is generated.

    Attributes:
        steps: denoiser calls that the plan selects and the method serves, sorted; of a sampling step, all of
            its calls or none.
        schedule: which calls are full, which cached.
        timesteps: of every call.
        levels: how noisy the samples are at every call; None where the scheduler's rule is not known.
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
    """What a corrector sees of one sampling step, and what it can ask for.

    Attributes:
        step: index of the denoiser call; of the first one where a sampling step takes several.
        kind: how it was evaluated.
        sample: x_t, `(B, C, H, W)`, as the pipeline holds it (not scaled for the network).
        prediction: what the pipeline passes to the scheduler (guided), like `sample`.
        features: what the cache holds.
        is_linear: whether the scheduler's step is linear in the prediction.
        is_guided: whether the prediction was made of two.
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
    """What becomes of a step.

    Attributes:
        prediction: handed to the scheduler's step in place of the pipeline's; enters a multistep history.
        prev_sample: replaces the sample that this step returns; None keeps it.
        shift: added to the sample that this step returns; shifts of several methods add up.
        features: replace what the cache holds; None keeps it.
        features_step: the call at which they were made, if it was another one than this.
        residuals: for each iteration, the rows that it refined and the residual of each, `(rows,)`. Where
            only the device knows which, a mask `(B,)`, bool, takes the place of their indices, with a number
            for each sample, `(B,)`.
        diverged: which samples kept an iterate because the next one moved further than the first, `(B,)`,
            bool.
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
        setting: where it works.
        remembers: how many features of full evaluations `before_call` wants to see.
        taps: steps at which `at_step` is called; those of the setting, unless a subclass says otherwise.
    """

    remembers = 1

    def __init__(self, setting: CorrectorContext) -> None:
        self.setting = setting
        self.taps: frozenset[int] = frozenset(setting.steps)

    def before_call(self, view: CallView) -> Evaluation | None:
        """Called before every denoiser call; None leaves it as it is."""
        return None

    def at_step(self, view: StepView) -> Correction | None:
        """Called at every tapped step, between network and scheduler; None leaves the step as it is."""
        return None


class Method(Protocol):
    """A correction method: its choices, and which steps it can serve."""

    def serves(self, schedule: CacheSchedule) -> tuple[int, ...]:
        """Steps at which the method can do anything."""

    def check(self, setting: CorrectorContext) -> None:
        """Refuses what cannot work, before anything is generated.

        Raises:
            PlanError: it says what cannot and what would.
        """

    def corrector(self, setting: CorrectorContext) -> Corrector:
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
