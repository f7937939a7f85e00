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
from typing import TYPE_CHECKING, Any

from errata.deploy.limits import LARGEST_HEADER, MOST_DIMENSIONS
from errata.deploy.strict_json import bounded_json
from errata.errors import ArtifactCorruptError

if TYPE_CHECKING:
    import torch

_COUNT_BYTES = 8
_METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
# Element types: what torch calls them, and bytes of an element.
_DTYPES = {
    "BF16": ("bfloat16", 2), "BOOL": ("bool", 1), "F16": ("float16", 2), "F32": ("float32", 4),
    "F64": ("float64", 8), "I16": ("int16", 2), "I32": ("int32", 4), "I64": ("int64", 8), "I8": ("int8", 1),
    "U8": ("uint8", 1),
}  # fmt: skip
_FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Type, shape and place of one tensor; `start` and `end` are bytes from the end of the header.

    `kind` is its type as the header spells it, such as `F32`.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements."""
        return torch_type(self.kind)

    @property
    def is_floating_point(self) -> bool:
        """Whether its elements are real numbers."""
        return is_float_kind(self.kind)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: free text.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def torch_type(kind: str) -> torch.dtype:
    """Return the type of torch for a type of elements, spelled as in a header."""
    import torch

    found: torch.dtype = getattr(torch, _DTYPES[kind][0])
    return found


def torch_name(kind: str) -> str:
    """Return what torch calls a type of elements, such as `torch.float32` for `F32`."""
    return f"torch.{_DTYPES[kind][0]}"


def kind_named(dtype: object) -> str:
    """Return how a header spells a type of torch, or one of the same name.

    Raises:
        ValueError: no header may have it.
    """
    for kind in _DTYPES:
        if torch_name(kind) == str(dtype):
            return kind
    raise ValueError(f"{dtype} cannot be stored; allowed are {', '.join(map(torch_name, _DTYPES))}")


def is_float_kind(kind: str) -> bool:
    """Return whether a type of elements, spelled as in a header, is of real numbers."""
    return kind in _FLOATS


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
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise _refusal(file, f"tensor {name!r} has the type {kind!r}; allowed are {', '.join(_DTYPES)}")
    if not _are_counts(shape) or len(shape) > MOST_DIMENSIONS or any(side > 2**48 for side in shape):
        raise _refusal(file, f"tensor {name!r} has an invalid shape: {str(shape)[:80]}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise _refusal(file, f"tensor {name!r} has invalid data_offsets: {str(offsets)[:80]}")
    start, end = offsets
    if end > data_bytes:
        raise _refusal(file, f"tensor {name!r} ends at byte {end:,} of {data_bytes:,}: larger than the file")
    if end - start != (needed := math.prod(shape) * _DTYPES[kind][1]):
        raise _refusal(file, f"tensor {name!r} is {kind} {shape}, {needed:,} bytes, and has {end - start:,}")
    return StoredTensor(kind=kind, shape=tuple(shape), start=start, end=end)


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
