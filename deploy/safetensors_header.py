"""The header of a safetensors file, checked before any library parses the file.

A file is eight bytes that count the header's, little-endian; the header, a JSON object; then the tensors.

Source: the format's page, https://huggingface.co/docs/safetensors; what is refused here beyond it are headers
of more than `LARGEST_HEADER` bytes, element types that no network's file has, and duplicate keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errata.deploy.limits import LARGEST_HEADER, MOST_DIMENSIONS
from errata.deploy.strict_json import bounded_json
from errata.errors import ArtifactCorruptError

_COUNT_BYTES = 8
_METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_DTYPES = {
    "BF16": torch.bfloat16, "BOOL": torch.bool, "F16": torch.float16, "F32": torch.float32,
    "F64": torch.float64, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "I8": torch.int8,
    "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Type, shape and place of one tensor; `start` and `end` are bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: free text.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(file: Path) -> Header:
    """Read the header, and check that its tensors fill the file exactly, without gaps or overlaps.

    Raises:
        ArtifactCorruptError: naming the file, and the tensor or number at fault.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = _header_length(file, opened.read(_COUNT_BYTES), size)
        text = opened.read(length)
    return _checked(file, text, size - _COUNT_BYTES - length)


def header_of(data: bytes, file: Path) -> Header:
    """Read and check the header of a whole file that is in memory; `file` is its name, for errors.

    Raises:
        ArtifactCorruptError: naming the file, and the tensor or number at fault.
    """
    length = _header_length(file, data[:_COUNT_BYTES], len(data))
    end = _COUNT_BYTES + length
    return _checked(file, data[_COUNT_BYTES:end], len(data) - end)


def _header_length(file: Path, count: bytes, size: int) -> int:
    if size < _COUNT_BYTES:
        raise _refusal(file, f"{size} bytes cannot hold the length of a header")
    length = int.from_bytes(count, "little")
    if length > LARGEST_HEADER:
        raise _refusal(file, f"it declares a header of {length:,} bytes; allowed are {LARGEST_HEADER:,}")
    if length > size - _COUNT_BYTES:
        raise _refusal(file, f"it declares a header of {length:,} bytes, and has {size:,} in all")
    return length


def _checked(file: Path, text: bytes, data_bytes: int) -> Header:
    """Return the header in `text`, which is followed by so many bytes of tensors."""
    value = _parse(file, text)
    metadata = value.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(item, str) for item in metadata.values()):
        raise _refusal(file, f"{_METADATA} is not an object of texts")
    tensors = {name: _entry(file, name, item, data_bytes) for name, item in value.items()}
    _check_coverage(file, tensors, data_bytes)
    return Header(tensors=tensors, metadata=metadata)


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _refusal(file, f"its header starts with {text[:8]!r}, not with an object")
    try:
        value = bounded_json(text)
    except ValueError as error:
        raise _refusal(file, f"its header is not valid JSON: {error}") from error
    parsed: dict[str, Any] = value
    return parsed


def _entry(file: Path, name: str, value: Any, data_bytes: int) -> StoredTensor:
    if not isinstance(value, dict) or set(value) != _ENTRY_KEYS:
        raise _refusal(file, f"tensor {name!r} does not have exactly the keys {sorted(_ENTRY_KEYS)}")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise _refusal(file, f"tensor {name!r} has the type {kind!r}; allowed are {', '.join(_DTYPES)}")
    if not _are_counts(shape) or len(shape) > MOST_DIMENSIONS or any(side > 2**48 for side in shape):
        raise _refusal(file, f"tensor {name!r} has an invalid shape: {str(shape)[:80]}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _refusal(file, f"tensor {name!r} has invalid data_offsets: {str(offsets)[:80]}")
    start, end = offsets
    if end > data_bytes:
        raise _refusal(file, f"tensor {name!r} ends at byte {end:,} of {data_bytes:,}: larger than the file")
    if end - start != (needed := math.prod(shape) * dtype.itemsize):
        raise _refusal(file, f"tensor {name!r} is {kind} {shape}, {needed:,} bytes, and has {end - start:,}")
    return StoredTensor(dtype=dtype, shape=tuple(shape), start=start, end=end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(file: Path, tensors: Mapping[str, StoredTensor], data_bytes: int) -> None:
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            trouble = "overlaps the one before it" if tensor.start < position else "leaves a gap before it"
            raise _refusal(file, f"tensor {name!r} starts at byte {tensor.start:,} and {trouble}")
        position = tensor.end
    if position != data_bytes:
        raise _refusal(file, f"{data_bytes - position:,} bytes after the last tensor belong to no tensor")


def _refusal(file: Path, reason: str) -> ArtifactCorruptError:
    return ArtifactCorruptError(f"{file} is not a safetensors file: {reason}; copy the artifact again")
