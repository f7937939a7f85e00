"""What a pipeline is told besides its noise: class labels, captions, guidance, for samples by their index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_rows import Row, digest_of

from errata.correct.sampling import batches_of
from errata.errors import ReportError


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Arguments for the images that are judged, and for those of the calibration.

    Attributes:
        classes: that can be asked for; 0 for a model without labels.
        captions: one for each judged image, then one for each trajectory of the calibration.
        samples: judged images; their labels run through all classes.
        guidance_scale: None leaves the argument out.
        eta: 0 leaves the argument out.
    """

    classes: int
    captions: tuple[str, ...]
    samples: int
    guidance_scale: float | None
    eta: float

    def inputs(self, indices: range) -> Mapping[str, Any]:
        """Pipeline arguments of judged images, as `report.run` asks for them."""
        if not (self.classes or self.captions):
            return {"batch_size": len(indices), **self._shared()}
        return {**self._own(indices, total=self.samples), **self._shared()}

    def calibration(self, *, samples: int, batch_size: int) -> dict[str, Any]:
        """Keyword arguments of `calibration.calibrate`."""
        options: dict[str, Any] = {"guidance_scale": self.guidance_scale}
        if self.captions:
            options["prompts"] = self.captions[self.samples :]
        if self.classes or self.eta:
            eta = {"eta": self.eta} if self.eta else {}
            options["inputs"] = [
                {**self._labels(batch, total=samples), **eta} for batch in batches_of(samples, batch_size)
            ]
        return options

    @property
    def digest(self) -> str:
        """Tells conditions apart that would be calibrated differently."""
        return digest_of([self.classes, self.captions, self.guidance_scale, self.eta])

    def _own(self, indices: range, *, total: int) -> dict[str, Any]:
        captions = {"prompt": [self.captions[index] for index in indices]} if self.captions else {}
        return {**self._labels(indices, total=total), **captions}

    def _labels(self, indices: range, *, total: int) -> dict[str, Any]:
        """Every class equally often, in order, as CacheQuant's script draws them."""
        if not self.classes:
            return {}
        return {"class_labels": [index * self.classes // total for index in indices]}

    def _shared(self) -> dict[str, Any]:
        guidance = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {**guidance, **({"eta": self.eta} if self.eta else {})}


def conditions_of(row: Row, pipe: Any) -> Conditions:
    """Conditions of a row on its pipeline.

    Raises:
        ReportError: labels for a model without classes, or too few captions.
    """
    labels = getattr(pipe, "num_labels", 0)
    if (row.labels is not None) != bool(labels):
        has = f"knows {labels} class labels" if labels else "knows no class labels"
        raise ReportError(
            f"`{row.name}` has labels {row.labels!r}, but `{row.pipeline}` {has}; choose another --pipeline"
        )
    nothing = pipe.unconditional_label if labels else None
    return Conditions(
        classes=labels - (nothing == labels - 1),
        captions=() if row.prompts is None else _captions(row),
        samples=row.samples,
        guidance_scale=row.guidance_scale,
        eta=row.eta,
    )


def _captions(row: Row) -> tuple[str, ...]:
    path = Path(str(row.prompts))
    needed = row.samples + row.calibration["samples"]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as problem:
        raise ReportError(
            f"captions `{path}` cannot be read: {problem.strerror}; write {needed} lines there, or give "
            "--prompts"
        ) from problem
    captions = tuple(line.strip() for line in lines if line.strip())[:needed]
    if len(captions) < needed:
        raise ReportError(
            f"`{path}` has {len(captions)} captions; {row.samples} judged images and "
            f"{row.calibration['samples']} trajectories need {needed}; add some, or lower the numbers"
        )
    return captions
