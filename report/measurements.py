"""What was measured of the images of one row and batch, as files that appear whole or not at all.

A folder of measurements holds one directory for each row, named by a digest of everything that decides the
row's images, and in it one safetensors file for each batch. So a run that was stopped goes on with what is
there, several processes fill one folder, and folders that were filled elsewhere add up. Nothing is held in
memory but the batch at hand: what belongs to all batches is read again in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from errata import directories
from errata.directories import refusals_as
from errata.errors import ReportError
from errata.runtime.schedule import StepKind

FEATURES, LOGITS, SHOWN = "features", "logits", "shown"


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """What was measured of a batch beside its images.

    Attributes:
        seconds: of the pipeline call, wall-clock.
        took: seconds with everything that was measured of the images.
        base: denoiser calls per image of the plain run, by kind.
        extra: those that the correction added.
        cost: median seconds of one call of each kind, where it happened.
        peak_bytes: highest memory during the call; None where it is not known.
        joules: energy that the device took during the call; None where it is not known.
    """

    seconds: float
    took: float
    base: Mapping[StepKind, float]
    extra: Mapping[StepKind, float]
    cost: Mapping[StepKind, float]
    peak_bytes: int | None
    joules: float | None


@dataclass(frozen=True, kw_only=True)
class BatchMeasured:
    """One row's images of one batch, of B samples.

    Attributes:
        features: `(B, D)`, float32.
        logits: `(B, K)`, float32: class scores, where the feature network has a classifier.
        scores: by name, `(B,)` float64: one number for each image, such as its PSNR.
        shown: `(n, C, H, W)`, uint8: the images that the page shows; n may be 0.
        facts: calls and times.
    """

    features: Tensor
    logits: Tensor | None
    scores: Mapping[str, Tensor]
    shown: Tensor
    facts: BatchFacts


class Measurements:
    """The folders of measurements; the first one is written to.

    Args:
        folders: made by `errata report`; what one lacks may lie in another.
        batches: indices of the images of each batch.
        names: of their files, which tell what decides the images.
    """

    def __init__(self, folders: Sequence[Path], *, batches: Sequence[range], names: Sequence[str]) -> None:
        self._folders = tuple(folders)
        self.batches = tuple(batches)
        self._names = tuple(names)

    @property
    def names_of_batches(self) -> tuple[str, ...]:
        """Names of the batches' files."""
        return self._names

    @property
    def samples(self) -> int:
        """Images of a row."""
        return sum(map(len, self.batches))

    def has(self, row: str, batch: int) -> bool:
        """Whether the batch of that number was measured."""
        return self._found(row, batch) is not None

    def missing(self, row: str) -> tuple[int, ...]:
        """Numbers of the batches that were not measured."""
        return tuple(batch for batch in range(len(self.batches)) if not self.has(row, batch))

    def write(self, row: str, batch: int, measured: BatchMeasured) -> None:
        """Keep a batch; whole or not at all."""
        tensors = {FEATURES: measured.features.float(), SHOWN: measured.shown}
        tensors |= {f"score.{name}": values.double() for name, values in measured.scores.items()}
        if measured.logits is not None:
            tensors[LOGITS] = measured.logits.float()
        data = save(
            {name: value.contiguous() for name, value in tensors.items()},
            metadata={"facts": json.dumps(asdict(measured.facts))},
        )
        write_whole(self._path(self._folders[0], row, batch), data)

    def chunks(self, row: str, name: str) -> Iterator[Tensor]:
        """One tensor of every batch, in order.

        Raises:
            ReportError: a batch is missing, or its file is damaged.
        """
        for batch in range(len(self.batches)):
            yield self._read(row, batch, name)

    def all_of(self, row: str, name: str, *, most: int | None = None) -> Tensor:
        """The tensors of the first batches as one, of at most `most` rows.

        Raises:
            ReportError: as `chunks`.
        """
        parts: list[Tensor] = []
        count = 0
        for part in self.chunks(row, name):
            parts.append(part)
            count += len(part)
            if most is not None and count >= most:
                break
        return torch.cat(parts)[:most]

    def facts(self, row: str) -> list[BatchFacts]:
        """What is no tensor, of every batch in order.

        Raises:
            ReportError: as `chunks`.
        """
        return [self.facts_of(row, batch) for batch in range(len(self.batches))]

    def facts_of(self, row: str, batch: int) -> BatchFacts:
        """What is no tensor, of one batch.

        Raises:
            ReportError: as `chunks`.
        """
        with self._opened(row, batch) as file:
            facts = json.loads(file.metadata()["facts"])
        return BatchFacts(**facts)

    def image_size(self, row: str) -> tuple[int, int, int]:
        """Height, width and channels of a row's images.

        Raises:
            ReportError: as `chunks`.
        """
        _, channels, height, width = self._read(row, 0, SHOWN).shape
        return height, width, channels

    def names(self, row: str) -> frozenset[str]:
        """Names of the tensors of a row's first batch.

        Raises:
            ReportError: as `chunks`.
        """
        with self._opened(row, 0) as file:
            return frozenset(file.keys())

    def _read(self, row: str, batch: int, name: str) -> Tensor:
        with self._opened(row, batch) as file:
            tensor: Tensor = file.get_tensor(name).clone()  # else it would keep the file mapped
        return tensor

    def _opened(self, row: str, batch: int) -> Any:
        path = self._found(row, batch)
        if path is None:
            raise ReportError(
                f"batch {batch} of row {row} was not measured; run the same command again to measure it"
            )
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as problem:
            raise ReportError(
                f"`{path}` is damaged ({problem}); remove it and run the same command again"
            ) from problem

    def _found(self, row: str, batch: int) -> Path | None:
        places = (self._path(folder, row, batch) for folder in self._folders)
        return next((path for path in places if path.is_file()), None)

    def _path(self, folder: Path, row: str, batch: int) -> Path:
        return folder / row / f"{self._names[batch]}.safetensors"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file of a report, and its folder where there is none, complete or not at all.

    Raises:
        ReportError: it cannot be written.
    """
    advice = "free some space, or choose another directory"
    with refusals_as(ReportError, doing=f"make `{path.parent}`", advice=advice):
        path.parent.mkdir(parents=True, exist_ok=True)
    directories.write_whole(path, data, error=ReportError, advice=advice)
