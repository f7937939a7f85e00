"""The file of an errata sheet: one safetensors file of a few kilobytes.

    tensor    type    shape      meaning
    call      I64     (R,)       denoiser call of each row
    kind      U8      (R,)       0 full evaluation, 1 cached evaluation; rows are sorted by kind, then call
    matrix    F32     (R, C, C)  M of each row
    bias      F32     (R, C)     b of each row

The metadata have one entry, `errata-sheet`: a JSON object with the keys of `SheetFacts`, `format` and
`sha256`. The digest covers the other keys and all tensors, so a file that was altered or damaged anywhere is
refused. It says nothing about who wrote it: for that there is `errata sign`.

Reading runs no code, and is bounded in memory and time.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from errata import canonical_json
from errata.correct.sheets.fitted_maps import CallLevels, FittedMaps
from errata.deploy.limits import MOST_CALLS
from errata.deploy.safetensors_header import Header, header_of
from errata.deploy.strict_json import bounded_json
from errata.errors import ArtifactCorruptError, PlanError
from errata.runtime.paired_change import PairedChange

FORMAT = "errata-sheet/1"
METADATA = "errata-sheet"
# A thousand calls of four channels take 80 kB.
LARGEST_SHEET = 2**19
_LARGEST_NUMBER = 1e4
_MOST_CHANNELS = 64
_ADVICE = "copy it again, or fit a new one with `errata sheet`"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_STEPS = re.compile(r"[0-9,\- ]{0,60000}")
# What the tensors are, R rows of C channels: type, and the sides of the shape.
_TENSORS = {
    "call": (torch.int64, "R"),
    "kind": (torch.uint8, "R"),
    "matrix": (torch.float32, "RCC"),
    "bias": (torch.float32, "RC"),
}


@dataclass(frozen=True, kw_only=True)
class SheetFacts:
    """What a sheet says beside its numbers.

    Attributes:
        artifact: digest of the artifact that it was fitted to.
        teacher: "float" or "self".
        plan: the other methods of the plan that it was fitted under, in order, each as its JSON value.
        plan_steps: for each of them, the calls where it acted, as an expression.
        samples: images of the fit.
        seed: of its image 0.
        levels: noise levels of the calls of the fit.
        measured: what it was measured to do, on noise that the fit did not see.
    """

    artifact: str
    teacher: str
    plan: tuple[Mapping[str, Any], ...]
    plan_steps: tuple[str, ...]
    samples: int
    seed: int
    levels: CallLevels
    measured: PairedChange


def to_bytes(maps: FittedMaps, facts: SheetFacts) -> bytes:
    """Return the file of a sheet; equal sheets give equal bytes."""
    tensors = {name: getattr(maps, name).contiguous().cpu() for name in _TENSORS}
    told = {"format": FORMAT, **asdict(facts)}
    told = {**told, "sha256": _digest(told, tensors)}
    return save(tensors, metadata={METADATA: canonical_json.dumps(told).decode().strip()})


def from_bytes(data: bytes, source: str) -> tuple[FittedMaps, SheetFacts]:
    """Return what `to_bytes` was given.

    `source` is named in errors.

    Raises:
        PlanError: it is not a sheet, is damaged, or has a format that this release does not read.
    """
    if len(data) > LARGEST_SHEET:
        raise PlanError(f"{source} has {len(data):,} bytes; a sheet has at most {LARGEST_SHEET:,}; {_ADVICE}")
    try:
        header = header_of(data, Path(source))
    except ArtifactCorruptError as problem:
        if data.startswith(b"{"):
            raise PlanError(
                f"{source} is not a sheet but JSON; a plan file goes to `--plan` or Plan.load"
            ) from problem
        reason = str(problem).removesuffix("; copy the artifact again").removeprefix(f"{Path(source)} ")
        raise PlanError(f"{source} is not a sheet, or is damaged: it {reason}; {_ADVICE}") from problem
    try:
        told = _metadata(header)
        rows, channels = _check_header(header)
        tensors = load(data)
        if told.pop("sha256") != _digest(told, tensors):
            raise ValueError("its digest does not belong to its contents")
        facts = _facts(told)
        _check_numbers(tensors, facts, rows=rows, channels=channels)
    except _OtherFormatError as problem:
        raise PlanError(f"{source} has format {problem}; this release reads {FORMAT}") from problem
    except (KeyError, TypeError, ValueError) as problem:
        raise PlanError(f"{source} is not a sheet, or is damaged: {problem}; {_ADVICE}") from problem
    return FittedMaps(**tensors), facts


class _OtherFormatError(Exception):
    """A sheet of another format."""


def _digest(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    hasher = hashlib.sha256(canonical_json.dumps(dict(told)))
    for name in _TENSORS:
        hasher.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _metadata(header: Header) -> dict[str, Any]:
    if set(header.metadata) != {METADATA}:
        raise ValueError(f"its metadata have the keys {sorted(header.metadata)[:4]}, not {METADATA!r} alone")
    told = bounded_json(header.metadata[METADATA].encode())
    if not isinstance(told, dict):
        raise ValueError(f"its metadata are a {type(told).__name__}, not an object")
    if told.get("format") != FORMAT:
        raise _OtherFormatError(repr(told.get("format"))[:80])
    expected = {"format", "sha256", *(field.name for field in fields(SheetFacts))}
    if odd := sorted(set(told) ^ expected):
        raise ValueError(f"missing or unknown key {odd[0]!r}")
    return told


def _check_header(header: Header) -> tuple[int, int]:
    """Check names, types and shapes; return the number of rows and channels."""
    if set(header.tensors) != set(_TENSORS):
        raise ValueError(f"it holds the tensors {sorted(header.tensors)[:6]}, not {sorted(_TENSORS)}")
    shape = header.tensors["bias"].shape
    sides = dict(zip("RC", shape, strict=False))
    for name, (dtype, letters) in _TENSORS.items():
        found = header.tensors[name]
        if found.dtype != dtype or found.shape != tuple(sides.get(letter) for letter in letters):
            raise ValueError(f"tensor {name!r} is {found.dtype} {found.shape}")
    rows, channels = shape
    if not 1 <= rows <= 2 * MOST_CALLS or not 1 <= channels <= _MOST_CHANNELS:
        raise ValueError(f"{rows} rows of {channels} channels")
    return rows, channels


def _facts(told: Mapping[str, Any]) -> SheetFacts:
    """Return the typed facts.

    Raises:
        ValueError, TypeError, KeyError: one of them is malformed.
    """
    if not _DIGEST.fullmatch(told["artifact"]) or told["teacher"] not in ("float", "self"):
        raise ValueError("artifact or teacher is malformed")
    plan, steps = told["plan"], told["plan_steps"]
    if not isinstance(plan, list) or not all(isinstance(part, dict) for part in plan):
        raise ValueError("plan is not a list of methods")
    if not isinstance(steps, list) or len(steps) != len(plan) or not all(map(_STEPS.fullmatch, steps)):
        raise ValueError("plan_steps does not belong to the plan")
    levels = CallLevels(**told["levels"])
    if not 1 <= len(levels.values) <= MOST_CALLS or type(levels.are_known) is not bool:
        raise ValueError("levels are malformed")
    values = tuple(_finite(value) for value in levels.values)
    if _count(levels.calls_per_step) < 1 or len(values) % levels.calls_per_step:
        raise ValueError("calls_per_step does not divide the number of calls")
    measured = PairedChange.from_json(told["measured"])
    return SheetFacts(
        artifact=told["artifact"],
        teacher=told["teacher"],
        plan=tuple(plan),
        plan_steps=tuple(steps),
        samples=_count(told["samples"]),
        seed=_count(told["seed"]),
        levels=CallLevels(values=values, are_known=levels.are_known, calls_per_step=levels.calls_per_step),
        measured=measured,
    )


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{str(value)[:40]} is not a count")
    return value


def _finite(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]} is not a finite number")
    return float(value)


def _check_numbers(tensors: Mapping[str, Tensor], facts: SheetFacts, *, rows: int, channels: int) -> None:
    """Check that the numbers are finite and of a sensible size, and that rows are sorted and unique."""
    for name in ("matrix", "bias"):
        values = tensors[name]
        if not bool(values.isfinite().all()) or float(values.abs().max()) > _LARGEST_NUMBER:
            raise ValueError(f"tensor {name!r} has a number that is not finite, or above {_LARGEST_NUMBER:g}")
    calls = len(facts.levels.values)
    call, kind = tensors["call"], tensors["kind"]
    if int(kind.max()) > 1 or int(call.min()) < 0 or int(call.max()) >= calls:
        raise ValueError(f"a row is of no call; there are {calls} calls, and the kinds 0 and 1")
    place = kind.long() * calls + call
    if not bool((place.diff() > 0).all()):
        raise ValueError("rows are not sorted, or there are two for one call")
