"""The denoiser's files hold exactly the tensors of the scheme, each of its type, shape and range."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from errata.deploy.manifest import Manifest
from errata.deploy.packing import has_code_out_of_range
from errata.deploy.safetensors_header import StoredTensor, read_header
from errata.deploy.tensors import TensorType, expected_tensors, odd_packed_codes
from errata.errors import ArtifactCorruptError

_CODES = ".codes"
_SCALES = (".scale", ".weight_scale")
# The largest code by which a scale is multiplied: of an input, or of a weight.
_LARGEST_CODE = {".scale": 255, ".weight_scale": 127}


def check_denoiser(files: Sequence[Path], unet: nn.Module, manifest: Manifest) -> None:
    """Compares headers, then values, with what the scheme says for this network.

    Raises:
        ArtifactCorrupt: naming the file and the tensor.
        OSError: a file cannot be read.
    """
    expected = expected_tensors(unet, manifest.scheme, num_steps=manifest.schedule.num_steps)
    places: dict[str, Path] = {}
    for file in files:
        header = read_header(file)
        if header.metadata:
            raise ArtifactCorruptError(f"{file} has metadata, which the format does not know; deploy again")
        if not header.tensors and len(files) > 1:
            raise ArtifactCorruptError(f"{file} is an empty shard; deploy again")
        for name, tensor in header.tensors.items():
            if name in places:
                raise ArtifactCorruptError(
                    f"{file} holds tensor {name!r}, which {places[name].name} holds too"
                )
            places[name] = file
            if name in expected:
                _check_type(file, name, tensor, expected[name], manifest)
    _check_names(files, set(places), set(expected))
    padded = odd_packed_codes(unet, manifest.scheme)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                _check_values(file, name, opened.get_tensor(name), is_padded=name in padded)


def _check_names(files: Sequence[Path], found: set[str], expected: set[str]) -> None:
    path = files[0] if len(files) == 1 else files[0].parent
    if missing := sorted(expected - found):
        raise ArtifactCorruptError(f"{path} lacks {len(missing)} tensors, the first is {missing[0]!r}")
    if extra := sorted(found - expected):
        raise ArtifactCorruptError(
            f"{path} holds {len(extra)} tensors outside the scheme, the first is {extra[0][:200]!r}"
        )


def _check_type(path: Path, name: str, found: StoredTensor, expected: TensorType, manifest: Manifest) -> None:
    # A cache-only recipe keeps the weights' floating type; beside quantized layers there is float32 only.
    is_open = not manifest.is_quantized and expected[0].is_floating_point and found.dtype.is_floating_point
    same_type = is_open or found.dtype == expected[0]
    if not same_type or found.shape != expected[1]:
        raise ArtifactCorruptError(
            f"{path}: tensor {name!r} is {found.dtype} {found.shape}, the scheme {manifest.recipe.name} says "
            f"{expected[0]} {expected[1]}"
        )


def _check_values(path: Path, name: str, value: Tensor, *, is_padded: bool) -> None:
    if name.endswith(_CODES) and has_code_out_of_range(value):
        raise ArtifactCorruptError(f"{path}: tensor {name!r} holds a code outside the symmetric range")
    if is_padded and int(value[-1]) >> 4:
        raise ArtifactCorruptError(f"{path}: tensor {name!r} fills its last byte up with another code than 0")
    if not value.is_floating_point():
        return
    if not bool(torch.isfinite(value).all()):
        raise ArtifactCorruptError(f"{path}: tensor {name!r} holds NaN or infinity")
    if name.endswith(_SCALES):
        _check_scales(path, name, value)


def _check_scales(path: Path, name: str, value: Tensor) -> None:
    if not bool((value > 0).all()):
        raise ArtifactCorruptError(f"{path}: tensor {name!r} holds a scale that is not positive")
    code = _LARGEST_CODE[f".{name.rpartition('.')[2]}"]
    if not bool(torch.isfinite(value * code).all()):
        raise ArtifactCorruptError(f"{path}: tensor {name!r} holds a scale that makes code {code} infinite")
