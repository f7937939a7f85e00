"""One shard: a sample-batch's trajectory in a safetensors file.

Tensors, for `calls` denoiser calls of `rows` batch rows each:

    sample      (calls, rows, C, H, W)
    timestep    (calls,)
    cond.NAME   (calls, …), or (1, …) where every call got the same values

Rows of a call lie as the pipeline passed them. With guidance there are several rows per sample, and all
rows of a kind come together: unconditional rows of every sample first, then conditional ones.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from errata import canonical_json
from errata.calibration.recorder import Trajectory
from errata.errors import CalibrationError
from errata.journal import Journal

__all__ = ["FOLDER", "Shard", "StepReader", "shard_bytes", "shard_name", "write_shard"]

FOLDER = "shards"
_COND = "cond."
# The types that torch and safetensors share, by their names there, in its order of alignment.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = list(_NAMES)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What `calibration.json` says about a shard.

    Args:
        file: its path inside the set.
        sha256: of the file, in hexadecimal.
        num_bytes: size of the file.
        num_samples: samples in it (rows divided by the rows per sample).
        inputs: digest of the pipeline arguments that the caller gave for it; None if there were none.
        tensors: dtype and shape of every tensor.
    """

    file: str
    sha256: str
    num_bytes: int
    num_samples: int
    inputs: str | None
    tensors: dict[str, dict[str, Any]]

    def is_intact(self, root: Path) -> bool:
        """Return whether the file under `root` has the recorded bytes; reads all of it."""
        path = root / self.file
        return (
            path.is_file()
            and path.stat().st_size == self.num_bytes
            and canonical_json.file_digest(path) == self.sha256
        )


def shard_name(index: int) -> str:
    """Return the path of a shard inside the set."""
    return f"{FOLDER}/{_stem(index)}.safetensors"


def write_shard(
    journal: Journal, index: int, trajectory: Trajectory, *, num_samples: int, inputs: str | None
) -> Shard:
    """Write a trajectory as an item of the journal.

    Raises:
        CalibrationError: the file cannot be written.
    """
    tensors = {"sample": trajectory.sample, "timestep": trajectory.timestep}
    tensors |= {_COND + name: value for name, value in trajectory.cond.items()}
    data = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
    journal.write(_stem(index), data)
    return Shard(
        file=shard_name(index),
        sha256=hashlib.sha256(data).hexdigest(),
        num_bytes=len(data),
        num_samples=num_samples,
        inputs=inputs,
        tensors={
            name: {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            for name, value in tensors.items()
        },
    )


def shard_bytes(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], *, metadata: Mapping[str, str] | None = None
) -> int:
    """Return the size of a safetensors file with tensors of these types and shapes, without making one."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    # safetensors sorts by alignment, the widest first, then by name.
    for name, (dtype, shape) in sorted(
        tensors.items(), key=lambda item: (-_ORDER.index(item[1][0]), item[0])
    ):
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end


def _stem(index: int) -> str:
    return f"{index:05d}"


class StepReader:
    """A reader of single steps of a memory-mapped shard; reads only the samples that are needed.

    Raises:
        CalibrationError: the file cannot be opened.
    """

    def __init__(self, path: Path, shard: Shard, *, rows_per_sample: int) -> None:
        self._num_samples = shard.num_samples
        self._rows_per_sample = rows_per_sample
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as problem:
            raise CalibrationError(f"shard `{path}` cannot be read ({problem}); calibrate again") from problem

    def sample(self, step: int, first: int, last: int) -> Tensor:
        """Return the denoiser's input for samples `first` to `last`: (rows, C, H, W)."""
        return self._rows("sample", step, first, last)

    def timestep(self, step: int) -> Tensor:
        """Return the call's timestep, ()."""
        return self._file.get_slice("timestep")[step : step + 1].reshape(())

    def cond(self, step: int, first: int, last: int) -> dict[str, Tensor]:
        """Return the other arguments for samples `first` to `last`; one without batch rows is whole."""
        names = sorted(name for name in self._file.keys() if name.startswith(_COND))  # noqa: SIM118
        return {name.removeprefix(_COND): self._rows(name, step, first, last) for name in names}

    def _rows(self, name: str, step: int, first: int, last: int) -> Tensor:
        part = self._file.get_slice(name)
        calls, *shape = part.get_shape()
        call = 0 if calls == 1 else step
        has_rows = bool(shape) and shape[0] == self._num_samples * self._rows_per_sample
        if not has_rows or last - first == self._num_samples:
            return part[call : call + 1].reshape(shape)
        kinds = [kind * self._num_samples for kind in range(self._rows_per_sample)]
        return torch.cat([part[call, kind + first : kind + last] for kind in kinds])
