"""The measurements of a report on disk: one file for each row and batch, written whole or not at all.

`measurements/` holds one directory for each row, named by a digest of everything that decides the row's
images, and in it one safetensors file for each batch. So a run that was interrupted resumes, several
processes fill one folder, and folders that were filled elsewhere add up. Only the batch at hand is held in
memory.
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

from errata.directories import check_is_vacant
from errata.errors import ReportError
from errata.journal import Journal
from errata.journal_rules import JournalRules, read_request
from errata.runtime.schedule import StepKind

FOLDER = "measurements"
RULES = JournalRules(
    work="measurements",
    format="errata-measurements/1",
    error=ReportError,
    request="settings.json",
    lock=".lock",
    logger="errata.report",
    format_key="schema",
    request_key=None,
    is_shared=True,
)
FEATURES, LOGITS, SHOWN = "features", "logits", "shown"
SCORE = "score."
"""Begins the name of a tensor that holds one number for each image."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What must be equal for a run to resume another's, beside what names a row's directory.

    Attributes:
        seed: of image 0.
        batch_size: images of a batch; they are made together, so their last bits depend on it.
        network: digest of the feature network's weights.
        reference: digest of the reference's mean and covariance.
        paired_with: what single images are compared with: a float model's fingerprint, or "uncorrected".
        scores: names of the metrics of single images, then of their models.
        shown: how many of the first images are kept.
    """

    seed: int
    batch_size: int
    network: str
    reference: str
    paired_with: str
    scores: tuple[str, ...]
    shown: int

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {**asdict(self), "scores": list(self.scores)}


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """What was measured of a batch beside its images.

    Attributes:
        seconds: of the pipeline call, wall-clock.
        took: seconds with everything that was measured of the images.
        base: denoiser calls per image of the plain run, by kind.
        extra: calls that the correction added, per image.
        cost: median seconds of one call of each kind that occurred.
        peak_bytes: peak memory during the call; None if it is not known.
        joules: energy that the device used during the call; None if it is not known.
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
        scores: by metric, `(B,)` float64.
        shown: `(n, C, H, W)`, uint8: the images that the page shows; n may be 0.
        facts: calls and times.
    """

    features: Tensor
    logits: Tensor | None
    scores: Mapping[str, Tensor]
    shown: Tensor
    facts: BatchFacts


class MeasurementStore:
    """Folders of measurements, of which at most one is written to.

    Args:
        source: the journal that is filled, or folders that are only read; a batch that one lacks may lie in
            another.
        batches: indices of the images of each batch.
        names: of the batches' files, see `errata.report.request.batch_names`.
    """

    def __init__(
        self, source: Journal | Sequence[Path], *, batches: Sequence[range], names: Sequence[str]
    ) -> None:
        self._journal = source if isinstance(source, Journal) else None
        self._folders = (source.path,) if isinstance(source, Journal) else tuple(source)
        self.batches = tuple(batches)
        self.batch_names = tuple(names)

    @property
    def samples(self) -> int:
        """Images of a row."""
        return sum(map(len, self.batches))

    @property
    def folder(self) -> Path:
        """The folder that is written to, or the first of those that are read."""
        return self._folders[0]

    def size(self, row: str, batch: int) -> int:
        """Return the bytes of a batch's file; 0 if it was not measured."""
        found = self._found(row, batch)
        return 0 if found is None else found.stat().st_size

    def has(self, row: str, batch: int) -> bool:
        """Return whether the batch of that number was measured."""
        return self._found(row, batch) is not None

    def missing(self, row: str) -> tuple[int, ...]:
        """Return the numbers of the batches that were not measured."""
        return tuple(batch for batch in range(len(self.batches)) if not self.has(row, batch))

    def write(self, row: str, batch: int, measured: BatchMeasured) -> None:
        """Store a batch, whole or not at all.

        Raises:
            ReportError: it cannot be written.
            ValueError: the folders are only read.
        """
        if self._journal is None:
            raise ValueError("these measurements are only read; make the store from a journal to add some")
        tensors = {FEATURES: measured.features.float(), SHOWN: measured.shown}
        tensors |= {f"{SCORE}{name}": values.double() for name, values in measured.scores.items()}
        if measured.logits is not None:
            tensors[LOGITS] = measured.logits.float()
        data = save(
            {name: value.contiguous() for name, value in tensors.items()},
            metadata={"facts": json.dumps(asdict(measured.facts))},
        )
        self._journal.write(f"{row}/{self.batch_names[batch]}", data)

    def chunks(self, row: str, name: str) -> Iterator[Tensor]:
        """Yield one tensor of every batch, in order.

        Raises:
            ReportError: a batch is missing, or its file is damaged.
        """
        for batch in range(len(self.batches)):
            yield self._read(row, batch, name)

    def all_of(self, row: str, name: str, *, most: int | None = None) -> Tensor:
        """Return the tensors of the first batches as one, of at most `most` rows.

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
        """Return the facts of every batch, in order.

        Raises:
            ReportError: as `chunks`.
        """
        return [self.facts_of(row, batch) for batch in range(len(self.batches))]

    def facts_of(self, row: str, batch: int) -> BatchFacts:
        """Return the facts of one batch.

        Raises:
            ReportError: as `chunks`.
        """
        with self._opened(row, batch) as file:
            facts = json.loads(file.metadata()["facts"])
        return BatchFacts(**facts)

    def image_size(self, row: str) -> tuple[int, int, int]:
        """Return height, width and channels of a row's images.

        Raises:
            ReportError: as `chunks`.
        """
        _, channels, height, width = self._read(row, 0, SHOWN).shape
        return height, width, channels

    def names(self, row: str) -> frozenset[str]:
        """Return the names of the tensors of a row's first batch.

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
        return folder / row / f"{self.batch_names[batch]}.safetensors"


def open_measurements(out: Path, settings: Settings) -> Journal:
    """Return the journal, a context manager, of the measurements in `out`.

    Entering it raises ReportError if `out` holds something else, or measurements with other settings.
    """
    folder = out / FOLDER

    def check_place() -> None:
        if (folder / RULES.request).is_file():
            return
        try:
            check_is_vacant(out, error=ReportError)
        except ReportError:
            if not _holds_only(out, folder):
                raise
            # Another process may begin it right now: the journal looks at what the folder holds.
        if not out.parent.is_dir():
            raise ReportError(f"cannot make `{out}`: `{out.parent}` is not a directory; create it first")

    return Journal(folder, settings.to_json(), RULES, check_place=check_place)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder of measurements.

    Raises:
        ReportError: it holds none, or those of another version.
    """
    if not (folder / RULES.request).is_file():
        raise ReportError(
            f"`{folder}` holds no measurements of `errata report`; give the --out of such a run"
        )
    settings, _ = read_request(folder, RULES)
    return settings


def _holds_only(out: Path, folder: Path) -> bool:
    try:
        return list(out.iterdir()) == [folder]
    except OSError:
        return False
