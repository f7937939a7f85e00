"""`calibration.json`: what was asked, what the denoiser was called with, and which shards hold it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from errata import canonical_json
from errata.calibration.shards import Shard, shard_name
from errata.errors import CalibrationError

__all__ = ["FINISHED", "FORMAT", "PARTIAL", "Calls", "Document", "Request", "differences"]

FINISHED = "calibration.json"
PARTIAL = "calibration.partial.json"
FORMAT = "errata-calibration/1"
_FAMILY = FORMAT.partition("/")[0]
_Kind = TypeVar("_Kind", "Request", "Calls", Shard)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides the bytes of a calibration set; two equal requests give equal sets.

    `scheduler_config` is plain JSON. `fingerprint` is that of the float UNet, `prompts` the digest of the
    prompts in use, `takes_inputs` says whether further pipeline arguments came with every sample-batch.
    """

    pipeline_class: str
    unet_class: str
    scheduler_class: str
    scheduler_config: dict[str, Any]
    fingerprint: str
    num_inference_steps: int
    num_samples: int
    batch_size: int
    seed: int
    guidance_scale: float | None
    prompts: str | None
    takes_inputs: bool
    device: str
    versions: dict[str, str]

    def batch_sizes(self) -> list[int]:
        """Samples of each sample-batch; the last one has what is left."""
        full, rest = divmod(self.num_samples, self.batch_size)
        return [self.batch_size] * full + [rest] * bool(rest)


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The denoiser calls that every trajectory of the set shares.

    Args:
        timesteps: the timestep of each call, in order; a sampler may repeat one.
        timestep_dtype: of the tensor that was passed, as `"int64"`.
        rows_per_sample: batch rows per sample, 2 with classifier-free guidance.
        sample_shape: (C, H, W) of the denoiser's input.
        sample_dtype: of the denoiser's input.
        cond: names of its other arguments, sorted.
    """

    timesteps: tuple[float, ...]
    timestep_dtype: str
    rows_per_sample: int
    sample_shape: tuple[int, ...]
    sample_dtype: str
    cond: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """The whole file; `calls` is None while there is no shard. Shard i holds sample-batch i."""

    request: Request
    calls: Calls | None = None
    shards: tuple[Shard, ...] = ()

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json.dumps({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, path: Path) -> "Document":
        """Read `calibration.json` or its partial form.

        Raises:
            CalibrationError: no calibration, of another version, or with missing, unknown or odd entries.
        """
        try:
            content = canonical_json.loads_strict(path.read_bytes())
        except (OSError, ValueError) as problem:
            raise CalibrationError(f"`{path}` cannot be read as JSON ({problem}); collect again") from problem
        _check_format(path, content)
        try:
            return cls._from_json(content)
        except (TypeError, ValueError, AttributeError) as problem:
            raise CalibrationError(f"`{path}` is damaged: {problem}; collect again") from problem

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> "Document":
        _require_keys(content, {"format", *(field.name for field in dataclasses.fields(cls))}, "the file")
        calls = content["calls"]
        document = cls(
            request=_build(Request, content["request"], "request"),
            calls=None if calls is None else _build(Calls, calls, "calls"),
            shards=tuple(_build(Shard, shard, "a shard") for shard in content["shards"]),
        )
        if document.calls and not all(type(t) in (int, float) for t in document.calls.timesteps):
            raise ValueError(f"its timesteps are {document.calls.timesteps}")
        names = [shard.file for shard in document.shards]
        if names != [shard_name(index) for index in range(len(names))]:
            raise ValueError(f"its shards are named {names}")
        if [shard.num_samples for shard in document.shards] != document.request.batch_sizes()[: len(names)]:
            raise ValueError("its shards do not hold the sample-batches of the request")
        if bool(document.shards) != (document.calls is not None):
            raise ValueError("it has shards without calls, or calls without shards")
        return document


def differences(recorded: "Request | Calls", now: "Request | Calls") -> list[str]:
    """One phrase for each entry in which the two differ, with both values; five, and how many more."""
    was, new = _leaves(dataclasses.asdict(recorded)), _leaves(dataclasses.asdict(now))
    names = [name for name in {**was, **new} if was.get(name) != new.get(name)]
    found = [f"{name}: recorded {was.get(name, 'nothing')}, now {new.get(name, 'nothing')}" for name in names]
    return [*found[:5], *([f"and {len(found) - 5} more"] if len(found) > 5 else [])]


def _check_format(path: Path, content: Any) -> None:
    name = content.get("format") if isinstance(content, dict) else None
    if not isinstance(name, str) or name.partition("/")[0] != _FAMILY:
        raise CalibrationError(f"`{path}` is no calibration: its format is {name!r}, not {FORMAT!r}")
    if name != FORMAT:
        raise CalibrationError(
            f"`{path}` has format version {name!r}; this release reads {FORMAT!r}; collect again, or use the "
            "release that wrote it"
        )


def _build(kind: type[_Kind], content: Any, name: str) -> _Kind:
    """A dataclass from the JSON object that has exactly its fields, each of the declared type."""
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    _require_keys(content, set(fields), name)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    for key, value in values.items():
        if not _fits(value, fields[key]):
            raise ValueError(f"`{key}` of {name} is {value!r}")
    make: Callable[..., _Kind] = kind
    return make(**values)


def _fits(value: Any, declared: Any) -> bool:
    """Whether a JSON value is of a field's declared type; looks at the outermost layer only."""
    options = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    kinds = {get_origin(option) or option for option in options}
    if float in kinds:
        kinds.add(int)
    return type(value) in kinds


def _require_keys(content: Any, expected: set[str], name: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{name} is {content!r}, not an object")
    if missing := sorted(expected - set(content)):
        raise ValueError(f"{name} lacks `{missing[0]}`")
    if unknown := sorted(set(content) - expected):
        raise ValueError(f"{name} has the unknown entry `{unknown[0]}`")


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """The plain values of a tree by their path; a list also tells its length, first."""
    match value:
        case dict():
            branches = {f"{path}.{key}".lstrip("."): item for key, item in value.items()}
        case list() | tuple():
            branches = {f"number of {path}": len(value)} | {
                f"{path}[{i}]": item for i, item in enumerate(value)
            }
        case _:
            return {path: value}
    return {name: leaf for at, branch in branches.items() for name, leaf in _leaves(branch, at).items()}
