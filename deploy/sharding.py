"""The denoiser's tensors in one file, or in several shards where one file would be too large.

There is no index beside the shards: the manifest lists them, and each says in its header what it holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from errata.deploy.manifest import Manifest
from errata.errors import ArtifactCorruptError, ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

DENOISER_FILE = "unet/errata.safetensors"
# The same as in diffusers and huggingface_hub.
MAX_SHARD_SIZE = "5GB"
_SHARD = re.compile(r"unet/errata-(\d{5})-of-(\d{5})\.safetensors")
_MOST_SHARDS = 99_999
_SIZE = re.compile(r"(\d{1,15}) ?([KMGT]I?)?B", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size_in_bytes(size: int | str) -> int:
    """Return the bytes of a size such as `"5GB"` (5e9), `"500MiB"` (500 * 2^20), or a number of bytes.

    Raises:
        ArtifactError: it is not a size, or not above zero.
    """
    spelled = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    number = size if type(size) is int else 0
    if spelled is not None:
        number = int(spelled[1]) * _UNITS[(spelled[2] or "").upper()]
    if number < 1:
        raise ArtifactError(
            f"max_shard_size={size!r}; allowed are a number of bytes above zero, or a text such as '5GB' or "
            "'500MiB'"
        )
    return number


def write_tensors(tensors: Mapping[str, Tensor], root: Path, *, max_shard_size: int) -> None:
    """Write the denoiser's tensors: `unet/errata.safetensors`, or shards of at most that many bytes of data.

    A tensor that is larger by itself has a shard to itself. The same tensors give the same bytes.

    Raises:
        ArtifactError: there would be more shards than their names can count.
    """
    from safetensors.torch import save_file  # with torch, which naming the files does not need

    shards = split(tensors, max_shard_size=max_shard_size)
    if len(shards) == 1:
        save_file(shards[0], root / DENOISER_FILE)
        return
    if len(shards) > _MOST_SHARDS:
        raise ArtifactError(
            f"max_shard_size={max_shard_size} makes {len(shards):,} shards; allowed are {_MOST_SHARDS:,}: "
            "give a larger one"
        )
    for number, shard in enumerate(shards, start=1):
        save_file(shard, root / f"unet/errata-{number:05d}-of-{len(shards):05d}.safetensors")


def split(tensors: Mapping[str, Tensor], *, max_shard_size: int) -> list[dict[str, Tensor]]:
    """Fill shards one after another, by name, with at most `max_shard_size` bytes each; one at least."""
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_size
    for name in sorted(tensors):
        size = tensors[name].nbytes
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_size
        shards[-1][name] = tensors[name]
        room -= size
    return shards


def denoiser_files(root: Path, manifest: Manifest) -> list[Path]:
    """Return the one file, or all the shards in order.

    Raises:
        ArtifactCorruptError: there is neither, both, or not every shard.
    """
    shards = sorted(name for name in manifest.files if _SHARD.fullmatch(name))
    if DENOISER_FILE in manifest.files:
        if shards:
            raise ArtifactCorruptError(f"{root} has both {DENOISER_FILE} and {shards[0]}; deploy again")
        return [root / DENOISER_FILE]
    if not shards:
        raise ArtifactCorruptError(f"{root} has no {DENOISER_FILE} and no shards; every artifact needs them")
    expected = [f"unet/errata-{number:05d}-of-{len(shards):05d}.safetensors" for number in _count(shards)]
    if len(shards) < 2 or shards != expected:
        odd = sorted(set(shards) ^ set(expected)) or shards
        raise ArtifactCorruptError(
            f"{root} has {len(shards)} shards of {DENOISER_FILE}, but {odd[0]} does not fit: several shards "
            "are numbered from 1 and say how many they are; copy the artifact again"
        )
    return [root / name for name in shards]


def is_denoiser_file(name: str) -> bool:
    """Return whether a path of the manifest is a place for the denoiser's tensors."""
    return name == DENOISER_FILE or _SHARD.fullmatch(name) is not None


def read_tensors(root: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Return all tensors of the denoiser, on the CPU; the artifact has been verified."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in denoiser_files(root, manifest):
        tensors |= load_file(file)
    return tensors


def _count(shards: Iterable[str]) -> range:
    return range(1, len(list(shards)) + 1)
