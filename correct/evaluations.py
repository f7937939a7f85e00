"""Full evaluations beside those of the plain run, and their count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.correct.corrector import Features, Rows, put, take
from errata.correct.guidance import Guidance
from errata.correct.noise_levels import NoiseLevels
from errata.correct.preview import SchedulerStep
from errata.errors import PlanError
from errata.runtime.denoiser import Denoiser
from errata.runtime.run import UNetCall
from errata.runtime.schedule import StepKind


class Evaluations:
    """Serves `StepView.evaluate` at one sampling step. See `errata.correct.corrector.Evaluate`.

    Conditioning is that of the step's own calls, whatever step is asked for.

    Attributes:
        extra: evaluations so far, by kind, as parts of the batch.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        calls: Sequence[UNetCall],
        pending: SchedulerStep,
        guidance: Guidance,
        levels: NoiseLevels | None,
    ) -> None:
        self._denoiser, self._calls = denoiser, calls
        self._pending, self._guidance, self._levels = pending, guidance, levels
        self._features = tuple(call.feature for call in calls if call.feature is not None)
        self.extra: dict[StepKind, float] = {}

    def __call__(
        self, samples: Tensor, rows: Rows = None, *, step: int | None = None
    ) -> tuple[Tensor, Features]:
        """See `Evaluate`."""
        chosen = take(samples, rows)
        scaled = self._scaled(chosen, step)
        first = self._calls[0].step if step is None else step
        raws: list[Tensor] = []
        features: list[Tensor] = []
        for index, call in enumerate(self._calls):
            raw, feature = self._evaluate(scaled, rows, call, step=first + index)
            raws.append(raw)
            if feature is not None:
                network_rows = self._guidance.network_rows(rows, call)
                features.append(put(self._features[index], network_rows, feature))
        if step is None:
            self._features = tuple(features)
        self.extra["full"] = self.extra.get("full", 0.0) + len(raws) * len(chosen) / len(samples)
        wide = torch.promote_types(raws[0].dtype, torch.float32)
        prediction = self._guidance.prediction([raw.to(wide) for raw in raws], chosen, step=first)
        return prediction, tuple(features)

    def _evaluate(
        self, scaled: Tensor, rows: Rows, call: UNetCall, *, step: int
    ) -> tuple[Tensor, Tensor | None]:
        x = self._guidance.expand(scaled, rows, call)
        return self._denoiser.full(x, step, self._guidance.conditioning(rows, call))

    def _scaled(self, samples: Tensor, step: int | None) -> Tensor:
        if step is None:
            return self._pending.scaled(samples)
        if self._levels is None:
            raise PlanError(
                f"step {step} cannot be evaluated ahead: the scheduler's noise levels are not known; "
                "correct with a method that needs none, such as IEC or Forecast"
            )
        return self._levels.scaled(samples, step)
