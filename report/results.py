"""What a report holds, and its JSON form `errata-report/1`.

    schema      "errata-report/1"
    protocol    how it was measured: samples, seeds, steps, feature network and digest, machine, versions, …
    sizes       artifact name → bytes of its weights as stored, and as float32
    backends    artifact name → kernel → number of layers that run on it
    costs       artifact name → kind of call → median seconds of one call, for the whole batch
    growth      how errors grow along a run, by artifact; see `errata.report.growth`
    metrics     descriptions of metrics of the user's own, see `errata.quality.Metric`
    rows        one per (artifact, plan), and those of the float model if there is one:
        artifact, plan      names; the float model's row has artifact "float", plan "none"
        role                "float", "uncorrected", "plan", or "equal compute" for a compute-matched
        alternative,
                            which the report added
        stands_for          what a compute-matched alternative is, in words
        steps               the plan's steps expression; those of all parts, joined with " + "
        sampling_steps      how many the sampler took
        samples             number of images
        evaluations         denoiser calls per image by kind ("full", "cached")
        compute             seconds per image of these calls at their measured costs
        overhead            null for the float model; else
            defined             Σ (extra calls × their measured cost) ÷ Σ (base calls × their cost)
            measured            median over batches of (wall-clock of the plan ÷ of the plain batch) − 1
            spread              [first, third quartile] of the same
            batches             number of batches timed
        seconds_per_image   median over batches, wall-clock, the whole pipeline call
        frechet             {value, interval}: Fréchet distance to the reference
        change              {value, interval}: `frechet` minus that of the same artifact uncorrected, paired
        change_to_float     {value, interval}: `frechet` minus that of the float model, paired
        psnr                {value, interval}: mean dB to the float model's image from the same noise
        psnr_change         {value, interval}: `psnr` minus that of the same artifact uncorrected, paired
        metrics             name → {value, interval}: all other metrics that were measured, such as "kid",
                            "inception_score", "precision", "recall", "ssim", "lpips", "clip_score"
        changes             likewise, minus those of the same artifact uncorrected, paired
        rivals              compute-matched alternatives, other uses of the same or less compute on the same
                            artifact or the float model: {artifact, plan, compute (as a fraction of this
                            row's), difference ({value, interval}: `frechet` of this row minus theirs,
                            paired)}
        front               "on", "near" or "off" the Pareto front of compute and distance, over all rows
        peak_bytes          peak memory during a batch: allocated on CUDA, else of the whole process
        joules_per_image    energy of the device, if it reports it
        verdict             {kind, sentence}
        same_steps_as       an earlier plan of this artifact that corrects the same steps, else null

Intervals are `[low, high]` at 95 %. What could not be measured is null. Readers ignore unknown keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from errata.errors import ReportError
from errata.quality.intervals import Estimate
from errata.quality.metric import Metric
from errata.report.protocol import Protocol, Size
from errata.report.verdict import Verdict

SCHEMA = "errata-report/1"
FLOAT = "float"
"""Name of the float model among artifacts, and of what single images are compared with."""
UNCORRECTED = "uncorrected"
"""Name of what single images are compared with if there is no float model."""

Role = Literal["float", "uncorrected", "plan", "equal compute"]
Front = Literal["on", "near", "off"]


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Extra time of a corrected run, as a fraction of the uncorrected one; see the module's description."""

    defined: float
    measured: float
    spread: tuple[float, float]
    batches: int


@dataclass(frozen=True, kw_only=True)
class ComputeMatchedResult:
    """A compute-matched alternative of a row; fields as in the module's description."""

    artifact: str
    plan: str
    compute: float
    difference: Estimate

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {**asdict(self), "difference": self.difference.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ComputeMatchedResult:
        """Read what `to_json` returned."""
        return cls(**{**value, "difference": Estimate.from_json(value["difference"])})


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one plan does to one artifact; fields as in the module's description."""

    artifact: str
    plan: str
    steps: str
    samples: int
    evaluations: Mapping[str, float]
    seconds_per_image: float
    frechet: Estimate
    verdict: Verdict
    overhead: Overhead | None = None
    change: Estimate | None = None
    change_to_float: Estimate | None = None
    same_steps_as: str | None = None
    role: Role = "plan"
    stands_for: str = ""
    sampling_steps: int = 0
    compute: float = 0.0
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    changes: Mapping[str, Estimate] = field(default_factory=dict)
    alternatives: tuple[ComputeMatchedResult, ...] = ()
    front: Front | None = None
    peak_bytes: int | None = None
    joules_per_image: float | None = None

    @property
    def is_float(self) -> bool:
        """Whether this is a row of the float model."""
        return self.artifact == FLOAT

    @property
    def is_corrected(self) -> bool:
        """Whether the plan was asked for and corrects something."""
        return self.change is not None and self.role == "plan"

    @property
    def is_alternative(self) -> bool:
        """Whether the row is a compute-matched alternative, which the report added."""
        return self.role == "equal compute"

    @property
    def psnr(self) -> Estimate | None:
        """Mean PSNR in dB, if single images were compared."""
        return self.metrics.get("psnr")

    @property
    def psnr_change(self) -> Estimate | None:
        """PSNR minus that of the same artifact uncorrected, paired."""
        return self.changes.get("psnr")

    @property
    def is_rival(self) -> bool:
        """Earlier name of `is_alternative`."""
        _warn("is_rival", "is_alternative")
        return self.is_alternative

    @property
    def rivals(self) -> tuple[ComputeMatchedResult, ...]:
        """Earlier name of `alternatives`."""
        _warn("rivals", "alternatives")
        return self.alternatives

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        value: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in _ESTIMATES:
            value[name] = _json(value[name])
        value["evaluations"] = dict(self.evaluations)
        for name in _NAMED_ESTIMATES:
            value[name] = {key: _json(each) for key, each in value[name].items() if key != "psnr"}
        value["overhead"] = asdict(self.overhead) if self.overhead else None
        value["verdict"] = asdict(self.verdict)
        value["psnr"], value["psnr_change"] = _json(self.psnr), _json(self.psnr_change)
        value["rivals"] = [each.to_json() for each in value.pop("alternatives")]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Row:
        """Read what `to_json` returned."""
        known = {item.name: value[item.name] for item in fields(cls) if item.name in value}
        for name in _ESTIMATES:
            if known.get(name) is not None:
                known[name] = Estimate.from_json(known[name])
        if known.get("overhead") is not None:
            overhead = known["overhead"]
            known["overhead"] = Overhead(
                defined=overhead["defined"],
                measured=overhead["measured"],
                spread=tuple(overhead["spread"]),
                batches=overhead["batches"],
            )
        for name in _NAMED_ESTIMATES:
            known[name] = _estimates(value, name)
        known["alternatives"] = tuple(map(ComputeMatchedResult.from_json, value.get("rivals", ())))
        verdict = known["verdict"]
        known["verdict"] = Verdict(verdict["kind"], verdict["sentence"])
        return cls(**known)


_ESTIMATES = ("frechet", "change", "change_to_float")
# By name, and the key beside them under which the JSON form holds that of the PSNR.
_NAMED_ESTIMATES = {"metrics": "psnr", "changes": "psnr_change"}


def _json(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_json()


def _estimates(value: Mapping[str, Any], name: str) -> dict[str, Estimate]:
    """Return all metrics of a row's JSON form, or their changes."""
    psnr = value.get(_NAMED_ESTIMATES[name])
    given = ({} if psnr is None else {"psnr": psnr}) | dict(value.get(name, {}))
    return {key: Estimate.from_json(each) for key, each in given.items()}


def _warn(old: str, new: str) -> None:
    text = f"Row.{old} is now Row.{new}; the old name goes with the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rows, and how they were measured."""

    rows: tuple[Row, ...]
    protocol: Protocol
    sizes: Mapping[str, Size] = field(default_factory=dict)
    backends: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    growth: Mapping[str, Any] = field(default_factory=dict)
    own_metrics: tuple[Metric, ...] = ()

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Names of the artifacts, in order, without the float model."""
        return tuple(dict.fromkeys(row.artifact for row in self.rows if not row.is_float))

    @property
    def float_row(self) -> Row | None:
        """The float model's row at the recorded number of steps, if it was measured."""
        return next((row for row in self.rows if row.is_float and not row.is_alternative), None)

    def of(self, artifact: str) -> tuple[Row, ...]:
        """Return the rows of one artifact, in order."""
        return tuple(row for row in self.rows if row.artifact == artifact)

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value in the schema of this module."""
        return {
            "schema": SCHEMA,
            "protocol": self.protocol.to_json(),
            "sizes": {name: asdict(size) for name, size in self.sizes.items()},
            "backends": {name: dict(kernels) for name, kernels in self.backends.items()},
            "costs": {name: dict(costs) for name, costs in self.costs.items()},
            "growth": dict(self.growth),
            "metrics": [metric.to_json() for metric in self.own_metrics],
            "rows": [row.to_json() for row in self.rows],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        """Read what `to_json` returned.

        Raises:
            ReportError: another schema, or a value that does not fit it.
        """
        schema = value.get("schema") if isinstance(value, Mapping) else None
        if schema != SCHEMA:
            raise ReportError(f"the report has schema {schema!r}; this release reads {SCHEMA!r}")
        try:
            return cls(
                rows=tuple(Row.from_json(row) for row in value["rows"]),
                protocol=Protocol.from_json(value["protocol"]),
                sizes={name: Size(**size) for name, size in value["sizes"].items()},
                backends={name: dict(kernels) for name, kernels in value["backends"].items()},
                costs={name: dict(costs) for name, costs in value.get("costs", {}).items()},
                growth=dict(value.get("growth", {})),
                own_metrics=tuple(map(Metric.from_json, value.get("metrics", ()))),
            )
        except (KeyError, TypeError, ValueError) as problem:
            raise ReportError(f"the report does not fit schema {SCHEMA!r}: {problem!r}") from problem
