"""Choices of a compression that whole images decide, from noise that nothing was fitted to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor

from errata.calibration import CalibrationSet
from errata.compress.compressed import CompressedPipeline, Compression
from errata.compress.jobs.held_out_images import HeldOutImages
from errata.errors import CalibrationError
from errata.journal import Stage
from errata.quality.paired_change import PairedChange

logger = logging.getLogger(__name__)

Candidate = tuple[str, Compression]
"""A compression, and its name in the journal."""


class ImageJudge:
    """Compares compressions of a pipeline by the PSNR of their images to the float model's.

    Args:
        pipe: the float pipeline; it is left as it was.
        calibration_set: how it is sampled.
        stage: where finished images are kept.

    Attributes:
        choices: what was decided, in words, by subject.
    """

    def __init__(self, pipe: DiffusionPipeline, calibration_set: CalibrationSet, *, stage: Stage) -> None:
        self._pipe, self._set, self._stage = pipe, calibration_set, stage
        self._known: dict[str, Tensor] = {}
        self.choices: dict[str, str] = {}

    @cached_property
    def can_judge(self) -> bool:
        """Whether the pipeline can be sampled as it was recorded; if not, a warning says why."""
        try:
            self._images  # noqa: B018 (samples the float model)
        except CalibrationError as problem:
            logger.warning("no images to judge by, so the output is not calibrated: %s", _advice(problem))
            return False
        return True

    @cached_property
    def _images(self) -> HeldOutImages:
        return HeldOutImages(self._pipe, self._set, stage=self._stage)

    def remember(self, choices: Mapping[str, str], *, subject: str) -> None:
        """Take over what an earlier compression decided on a subject, if it did."""
        if subject in choices:
            self.choices[subject] = choices[subject]

    def change(self, before: Candidate, after: Candidate) -> PairedChange:
        """Return what the second does to the PSNR of the first."""
        return PairedChange.of(self._psnr(before), self._psnr(after))

    def keeps(self, subject: str, chosen: Candidate, simple: Candidate) -> bool:
        """Return whether what the recipe asks for stays: unless the simple choice is better beyond noise."""
        change = self.change(chosen, simple)
        kept = simple if change.helps else chosen
        self.choices[subject] = (
            f"{kept[0]}; with {simple[0]} in place of {chosen[0]}, PSNR to the float model goes from "
            f"{change.text()}"
        )
        (logger.warning if change.helps else logger.info)("%s: %s", subject, self.choices[subject])
        return not change.helps

    def _psnr(self, candidate: Candidate) -> Tensor:
        name, compression = candidate
        if name not in self._known:
            self._known[name] = self._images.psnr(name, CompressedPipeline(self._pipe, compression, Path()))
        return self._known[name]


def _advice(problem: CalibrationError) -> str:
    return f"{problem}; an artifact can get an errata sheet later, see `errata sheet`"
