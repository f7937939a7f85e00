"""What a report needs beside its measurements: rows, sizes, protocol. With it, no model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from errata import canonical_json
from errata.errors import ReportError
from errata.quality.frechet import FeatureStatistics
from errata.quality.reference import Reference
from errata.report.grid import RowSpec
from errata.report.measurements import write_whole
from errata.report.protocol import Protocol
from errata.report.results import Size

FILE, REFERENCE_FILE = "ledger.json", "reference.safetensors"


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Written once, when the first batch of every row that was asked for has been measured.

    Attributes:
        rows: those that were asked for, then those of equal compute.
        batches: how many images each batch has.
        batch_names: of the files of each batch.
        protocol: of the measurement; its command, intervals and times are filled in later.
        sizes: bytes of each artifact.
        backends: kernels of each artifact.
        repeats: artifact and plan of rows that repeat an earlier plan, with that one's name.
        growth: how errors grow along a run, by artifact.
        promised_seconds: denoiser calls of all rows at the costs of the first batch.
    """

    rows: tuple[RowSpec, ...]
    batches: tuple[int, ...]
    batch_names: tuple[str, ...]
    protocol: Protocol
    sizes: Mapping[str, Size]
    backends: Mapping[str, Mapping[str, int]]
    repeats: tuple[tuple[str, str, str], ...] = ()
    growth: Mapping[str, Any] = field(default_factory=dict)
    promised_seconds: float = 0.0

    @property
    def ranges(self) -> tuple[range, ...]:
        """Indices of the images of each batch."""
        starts = [sum(self.batches[:number]) for number in range(len(self.batches))]
        return tuple(range(start, start + size) for start, size in zip(starts, self.batches, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "batches": list(self.batches),
            "batch_names": list(self.batch_names),
            "protocol": self.protocol.to_json(),
            "sizes": {name: asdict(size) for name, size in self.sizes.items()},
            "backends": {name: dict(kernels) for name, kernels in self.backends.items()},
            "repeats": [list(each) for each in self.repeats],
            "growth": dict(self.growth),
            "promised_seconds": self.promised_seconds,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """Inverse of `to_json`."""
        return cls(
            rows=tuple(RowSpec.from_json(row) for row in value["rows"]),
            batches=tuple(value["batches"]),
            batch_names=tuple(value["batch_names"]),
            protocol=Protocol.from_json(value["protocol"]),
            sizes={name: Size(**size) for name, size in value["sizes"].items()},
            backends=dict(value["backends"]),
            repeats=tuple((artifact, plan, same) for artifact, plan, same in value["repeats"]),
            growth=dict(value["growth"]),
            promised_seconds=float(value["promised_seconds"]),
        )

    def write(self, folder: Path) -> None:
        """Keep it among the measurements."""
        write_whole(folder / FILE, canonical_json.dumps(self.to_json()))

    @classmethod
    def read(cls, folder: Path) -> Ledger:
        """What `write` wrote.

        Raises:
            ReportError: it is not there, or damaged.
        """
        try:
            return cls.from_json(canonical_json.loads_strict((folder / FILE).read_bytes()))
        except FileNotFoundError as problem:
            raise ReportError(
                f"`{folder}` has no {FILE}: not even the first batch was measured; run the same command "
                "again to go on"
            ) from problem
        except (OSError, KeyError, TypeError, ValueError) as problem:
            raise ReportError(
                f"`{folder / FILE}` is damaged ({problem!r}); remove it and run the same command again"
            ) from problem

    def agrees_with(self, other: Ledger) -> bool:
        """Whether the measurements of both add up to one report."""
        same_rows = [(row.key, row.directory) for row in self.rows] == [
            (row.key, row.directory) for row in other.rows
        ]
        return same_rows and (self.batches, self.batch_names) == (other.batches, other.batch_names)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What images are judged by without the feature network: statistics, and real features if kept."""

    statistics: FeatureStatistics
    real: Tensor | None

    @classmethod
    def of(cls, reference: Reference) -> Target:
        """That of a reference."""
        return cls(statistics=reference.statistics, real=reference.real)

    def write(self, folder: Path) -> None:
        """Keep it among the measurements."""
        tensors = {
            "mean": self.statistics.mean.contiguous(),
            "covariance": self.statistics.covariance.contiguous(),
            "count": torch.tensor(self.statistics.count),
        }
        if self.real is not None:
            tensors["real"] = self.real.float().contiguous()
        write_whole(folder / REFERENCE_FILE, save(tensors))

    @classmethod
    def read(cls, folder: Path) -> Target:
        """What `write` wrote.

        Raises:
            ReportError: it is not there, or damaged.
        """
        file = folder / REFERENCE_FILE
        try:
            tensors = load(file.read_bytes())
            statistics = FeatureStatistics(tensors["mean"], tensors["covariance"], int(tensors["count"]))
        except Exception as problem:  # safetensors has errors of its own for every damage
            raise ReportError(f"`{file}` cannot be read ({problem}); run the same command again") from problem
        return cls(statistics=statistics, real=tensors.get("real"))
