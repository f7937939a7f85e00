"""One finished stage on disk: a safetensors file that carries the digest of its tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errata.fingerprint import value_digest

_DIGEST = "sha256"


def write_stage(file: Path, tensors: Mapping[str, Tensor], *, owner: str) -> None:
    """Writes contiguous CPU tensors; `file` is there complete, and safe from a power cut, or not at all.

    `owner` enters the digest: a file of another stage or request is not taken for this one.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    save_file(dict(tensors), temporary, metadata={_DIGEST: value_digest(tensors, name=owner)})
    _to_disk(temporary)
    temporary.replace(file)
    _to_disk(file.parent)


def read_stage(file: Path, *, owner: str) -> dict[str, Tensor] | None:
    """The tensors, copied into memory; None where the file is damaged or belongs to something else."""
    try:
        with safe_open(file, framework="pt") as opened:
            recorded = (opened.metadata() or {}).get(_DIGEST)
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None
    return tensors if value_digest(tensors, name=owner) == recorded else None


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories, and needs it not
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
