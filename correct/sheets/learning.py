"""The method that a sheet is fitted with: it asks the teacher at every evaluation, learns, and corrects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.correct.network_method import NetworkMethod
from errata.correct.pipeline import CorrectedPipeline
from errata.correct.sheets.teacher import Teacher
from errata.runtime.denoiser import Conditioning, Denoiser, WrappedDenoiser
from errata.runtime.output_map import mapped
from errata.runtime.output_moments import OutputMoments
from errata.runtime.schedule import StepKind


@dataclass(frozen=True, eq=False)
class Learning(NetworkMethod):
    """A correction by the map of all moments so far, to which every evaluation adds its own first.

    A call is learned from once in a run; further evaluations that methods of the plan make there are only
    corrected.

    Args:
        teacher: what the right prediction is.
        moments: what is added to.
    """

    teacher: Teacher
    moments: OutputMoments
    _images: list[int] = field(default_factory=list)
    _maps: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self, images: range) -> None:
        """Begin a run that samples these images."""
        self._images[:] = images
        self._maps.clear()

    def network_correction(
        self, corrected: CorrectedPipeline, steps: tuple[int, ...]
    ) -> Callable[[Denoiser], Denoiser]:
        """Return what puts the learning map behind a denoiser."""
        return lambda denoiser: _LearningDenoiser(denoiser, self)

    def to_json(self) -> dict[str, Any]:
        """Learning is not stored: see `Sheet`."""
        raise NotImplementedError("a plan that learns has no file; store the sheet that it leads to")

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Learning:
        """Learning is not stored: see `Sheet`."""
        raise NotImplementedError("a plan that learns has no file")

    def corrected(
        self, prediction: Tensor, x: Tensor, step: int, kind: StepKind, cond: Conditioning
    ) -> Tensor:
        """Learn from an evaluation, and return its corrected prediction."""
        if kind not in self.teacher.kinds:
            return prediction
        if step not in self._maps:
            learned, target = self.teacher.pair(prediction, x, step, kind, cond)
            images = torch.arange(len(x)) % len(self._images) + self._images[0]
            self.moments.add(step, learned, target, images)
            self._maps[step] = self.moments.map_of(step)
        matrix, bias = self._maps[step]
        return mapped(prediction, matrix.to(prediction.device), bias.to(prediction.device))


class _LearningDenoiser(WrappedDenoiser):
    """A `Denoiser` whose predictions go through `Learning`."""

    def __init__(self, denoiser: Denoiser, learning: Learning) -> None:
        super().__init__(denoiser)
        self._learning = learning

    def corrected(
        self, prediction: Tensor, x: Tensor, step: int, kind: StepKind, cond: Conditioning
    ) -> Tensor:
        """Return what `Learning` makes of a prediction."""
        return self._learning.corrected(prediction, x, step, kind, cond)
