"""What a report measures: its rows, and the index that is kept beside their measurements."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from errata import canonical_json
from errata.correct import Plan
from errata.deploy import DeployedPipeline
from errata.directories import write_whole
from errata.errors import ReportError
from errata.quality.metric import Metric
from errata.quality.moments import FeatureStatistics
from errata.quality.reference import Reference
from errata.report.protocol import Protocol, Size, kernels_of
from errata.report.results import FLOAT, Role

Key = tuple[str, str]
"""Names of artifact and plan."""

FLOAT_KEY: Key = (FLOAT, "none")
# Hexadecimal digits of a digest that name a row's measurements; 2^80 rows before two are likely to collide.
_DIGITS = 40
# Written under this name since the first release, when the index was called a ledger.
FILE, REFERENCE_FILE = "ledger.json", "reference.safetensors"
ADVICE = "free some space, or choose another directory"
"""What to do when a file of a report cannot be written."""


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """A row before it is measured.

    Attributes:
        artifact: its name; `FLOAT` for the float model.
        plan_name: what the row is called.
        role: why it is there.
        plan: what corrects it; None for the float model.
        steps: sampling steps.
        directory: of its measurements.
        stands_for: what the row is, in words, if the report added it.
    """

    artifact: str
    plan_name: str
    role: Role
    plan: Plan | None
    steps: int
    directory: str
    stands_for: str = ""

    @property
    def key(self) -> Key:
        """Names of artifact and plan."""
        return self.artifact, self.plan_name

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {
            "artifact": self.artifact,
            "plan_name": self.plan_name,
            "role": self.role,
            "plan": None if self.plan is None else self.plan.to_json(),
            "steps": self.steps,
            "directory": self.directory,
            "stands_for": self.stands_for,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RowSpec:
        """Read what `to_json` returned."""
        plan = value["plan"]
        return cls(**{**value, "plan": None if plan is None else Plan.from_json(plan)})


def artifact_row(
    name: str,
    deployed: DeployedPipeline,
    plan_name: str,
    plan: Plan,
    *,
    role: Role,
    steps: int | None = None,
    stands_for: str = "",
) -> RowSpec:
    """Return a row of an artifact, at the recorded number of steps unless `steps` is given."""
    taken = deployed.num_inference_steps if steps is None else steps
    decides = {
        "artifact": deployed.manifest.sha256,
        "device": deployed.pipe.device.type,
        "kernels": kernels_of(deployed),
        # By the steps that it comes to: however they are spelled, they are measured once.
        "plan": [[method.to_json(), list(placed)] for method, placed in plan.placed(deployed.schedule)],
        "steps": taken,
    }
    return RowSpec(
        artifact=name,
        plan_name=plan_name,
        role=role,
        plan=plan,
        steps=taken,
        directory=_directory(decides),
        stands_for=stands_for,
    )


def float_row(fingerprint: str, steps: int, *, device: str, recorded_steps: int) -> RowSpec:
    """Return a row of the float model; at another number of steps it is a compute-matched alternative."""
    is_alternative = steps != recorded_steps
    return RowSpec(
        artifact=FLOAT,
        plan_name=f"{steps} steps" if is_alternative else "none",
        role="equal compute" if is_alternative else "float",
        plan=None,
        steps=steps,
        directory=_directory({"float": fingerprint, "steps": steps, "device": device}),
        stands_for=f"the float model with {steps} step{'s' * (steps != 1)}" if is_alternative else "",
    )


def repeats(rows: Sequence[RowSpec]) -> dict[Key, str]:
    """Return the earlier plan of each row that corrects the same steps by the same methods."""
    first: dict[Key, str] = {}  # artifact and directory, to plan
    repeated: dict[Key, str] = {}
    for row in rows:
        name = first.setdefault((row.artifact, row.directory), row.plan_name)
        if name != row.plan_name:
            repeated[row.key] = name
    return repeated


def check_names(plans: Iterable[str]) -> None:
    """Check that no plan has a name that the report gives to rows of its own.

    Raises:
        ReportError: a plan has.
    """
    for name in plans:
        if re.fullmatch(r"\d+ steps|\+\d+ full|second-order at .*", name):
            raise ReportError(f"plan {name!r} has the name of a row that the report adds; rename it")


def _directory(decides: Mapping[str, Any]) -> str:
    return canonical_json.digest(decides)[:_DIGITS]


@dataclass(frozen=True, kw_only=True)
class ReportIndex:
    """What merging needs beside the measurements; with it, no model is needed.

    Written once, when the first batch of every row that was asked for has been measured.

    Attributes:
        rows: those that were asked for, then the compute-matched alternatives.
        batches: how many images each batch has.
        batch_names: of the files of each batch.
        protocol: of the measurement; its command, intervals and times are filled in later.
        sizes: bytes of each artifact.
        backends: kernels of each artifact.
        repeats: artifact and plan of rows that repeat an earlier plan, with that one's name.
        growth: how errors grow along a run, by artifact.
        promised_seconds: denoiser calls of all rows at the costs of the first batch.
        metrics: descriptions of the user's own metrics.
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
    metrics: tuple[Metric, ...] = ()

    @property
    def ranges(self) -> tuple[range, ...]:
        """Indices of the images of each batch."""
        starts = [sum(self.batches[:number]) for number in range(len(self.batches))]
        return tuple(range(start, start + size) for start, size in zip(starts, self.batches, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
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
            "metrics": [metric.to_json() for metric in self.metrics],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ReportIndex:
        """Read what `to_json` returned."""
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
            metrics=tuple(Metric.from_json(metric) for metric in value.get("metrics", ())),
        )

    def write(self, folder: Path) -> None:
        """Write it beside the measurements."""
        data = canonical_json.dumps(self.to_json())
        write_whole(folder / FILE, data, error=ReportError, advice=ADVICE)

    @classmethod
    def read(cls, folder: Path) -> ReportIndex:
        """Return what `write` wrote.

        Raises:
            ReportError: it is not there, or damaged.
        """
        try:
            return cls.from_json(canonical_json.loads_strict((folder / FILE).read_bytes()))
        except FileNotFoundError as problem:
            raise ReportError(
                f"`{folder}` has no {FILE}: its first batch is not complete; run the same command again to "
                "resume"
            ) from problem
        except (OSError, KeyError, TypeError, ValueError) as problem:
            raise ReportError(
                f"`{folder / FILE}` is damaged ({problem!r}); remove it and run the same command again"
            ) from problem

    def agrees_with(self, other: ReportIndex) -> bool:
        """Return whether the measurements of both add up to one report."""
        same_rows = [(row.key, row.directory) for row in self.rows] == [
            (row.key, row.directory) for row in other.rows
        ]
        return same_rows and (self.batches, self.batch_names) == (other.batches, other.batch_names)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What images are compared with once their features are known: statistics, and real features if kept."""

    statistics: FeatureStatistics
    real: Tensor | None

    @classmethod
    def of(cls, reference: Reference) -> Target:
        """Return that of a reference."""
        return cls(statistics=reference.statistics, real=reference.real)

    def write(self, folder: Path) -> None:
        """Write it beside the measurements."""
        tensors = {
            "mean": self.statistics.mean.contiguous(),
            "covariance": self.statistics.covariance.contiguous(),
            "count": torch.tensor(self.statistics.count),
        }
        if self.real is not None:
            tensors["real"] = self.real.float().contiguous()
        write_whole(folder / REFERENCE_FILE, save(tensors), error=ReportError, advice=ADVICE)

    @classmethod
    def read(cls, folder: Path) -> Target:
        """Return what `write` wrote.

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
