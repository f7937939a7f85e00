"""Which tensors an artifact's denoiser files hold: exactly these, of these types, shapes and ranges.

Without torch. Types are spelled as in the header of a safetensors file, such as `F32`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from errata.deploy.manifest import Manifest
from errata.deploy.safetensors_header import (
    Header,
    StoredTensor,
    is_float_kind,
    kind_named,
    read_header,
    torch_name,
)
from errata.errors import ArtifactCorruptError
from errata.runtime.scheme import OUTPUT_MAP, CacheCorrection, LayerScheme, Scheme, layer_sites
from errata.runtime.weight_bits import fault_of, stored_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.runtime.structure import Network

TensorType = tuple[str, tuple[int, ...]]
_SCALES = (".scale", ".weight_scale")
# The largest code by which a scale is multiplied: of an input, or of a weight.
_LARGEST_CODE = {".scale": 255, ".weight_scale": 127}
# How numpy calls the types that a header may name; it has no bfloat16.
_NUMPY_TYPES = {
    "BF16": "<u2", "BOOL": "?", "F16": "<f2", "F32": "<f4", "F64": "<f8", "I16": "<i2", "I32": "<i4",
    "I64": "<i8", "I8": "i1", "U8": "u1",
}  # fmt: skip


def expected_types(unet: Network, scheme: Scheme, *, num_steps: int) -> dict[str, TensorType]:
    """Return type and shape of every tensor of the file, by name.

    `unet` is the float network, possibly on the meta device, or its outline. Float parameters that are not
    quantized appear with its type; a cache-only artifact may hold them in another floating-point one.
    """
    expected: dict[str, TensorType] = {}
    for layer in scheme.layers:
        module: Any = unet.get_submodule(layer.name)
        expected |= _layer_tensors(layer, tuple(module.weight.shape), module.bias is not None)
        for site in layer_sites(layer):
            expected |= _site_tensors(site.name, num_steps)
    for attention in scheme.attentions:
        for name in attention.sites:
            expected |= _site_tensors(name, num_steps)
    if scheme.correction is not None:
        expected |= _correction_tensors(scheme.correction, num_steps)
    if scheme.output is not None:
        channels = scheme.output.channels
        matrix, bias = OUTPUT_MAP
        expected[matrix] = ("F32", (num_steps, channels, channels))
        expected[bias] = ("F32", (num_steps, channels))
    for name, parameter in float_parameters(unet, scheme).items():
        expected[name] = (kind_named(parameter.dtype), tuple(parameter.shape))
    return expected


def float_parameters(unet: Network, scheme: Scheme) -> dict[str, Any]:
    """Return the parameters and buffers of the float network that stay: all but those of quantized layers."""
    quantized = tuple(f"{layer.name}." for layer in scheme.layers)
    return {
        name: value for name, value in unet.state_dict().items() if not name.startswith(quantized or ("\0",))
    }


def _layer_tensors(layer: LayerScheme, shape: tuple[int, ...], has_bias: bool) -> dict[str, TensorType]:
    tensors: dict[str, TensorType] = {
        f"{layer.name}.codes": stored_type(layer.weight_bits, shape),
        f"{layer.name}.weight_scale": ("F32", (len(layer.input_widths), shape[0])),
    }
    if has_bias:
        tensors[f"{layer.name}.bias"] = ("F32", (shape[0],))
    return tensors


def _correction_tensors(correction: CacheCorrection, num_steps: int) -> dict[str, TensorType]:
    channels = {("cache", "gain", "shift"): correction.feature_channels}
    channels |= {(layer.name, "output_gain", "output_shift"): layer.channels for layer in correction.layers}
    return {
        f"{name}.{kind}": ("F32", (num_steps, width))
        for (name, *kinds), width in channels.items()
        for kind in kinds
    }


def _site_tensors(name: str, num_steps: int) -> dict[str, TensorType]:
    return {f"{name}.scale": ("F32", (num_steps,)), f"{name}.zero_point": ("U8", (num_steps,))}


def check_denoiser(files: Sequence[Path], unet: Network, manifest: Manifest) -> None:
    """Compare headers, then values, with what the scheme says for this network, or its outline.

    Raises:
        ArtifactCorruptError: naming the file and the tensor.
        SafetensorError: a file is not valid for the library that will load it.
        OSError: a file cannot be read.
    """
    expected = expected_types(unet, manifest.scheme, num_steps=manifest.schedule.num_steps)
    headers = {file: read_header(file) for file in files}
    _check_headers(headers, expected, manifest)
    coded = {f"{layer.name}.codes": layer for layer in manifest.scheme.layers}
    for file, header in headers.items():
        with safe_open(file, framework="np"):
            pass
        for name, value in _values(file, header):
            if name in coded:
                _check_codes(file, name, value, coded[name], unet)
            _check_values(file, name, value)


def _check_headers(
    headers: Mapping[Path, Header], expected: Mapping[str, TensorType], manifest: Manifest
) -> None:
    places: dict[str, Path] = {}
    for file, header in headers.items():
        if header.metadata:
            raise ArtifactCorruptError(f"{file} has metadata, which the format does not allow; deploy again")
        if not header.tensors and len(headers) > 1:
            raise ArtifactCorruptError(f"{file} is an empty shard; deploy again")
        for name, tensor in header.tensors.items():
            if name in places:
                raise ArtifactCorruptError(
                    f"{file} holds tensor {name!r}, which {places[name].name} holds too"
                )
            places[name] = file
            if name in expected:
                _check_type(file, name, tensor, expected[name], manifest)
    _check_names(list(headers), set(places), set(expected))


def _check_names(files: Sequence[Path], found: set[str], expected: set[str]) -> None:
    path = files[0] if len(files) == 1 else files[0].parent
    if missing := sorted(expected - found):
        raise ArtifactCorruptError(
            f"{len(missing)} tensors are missing from {path}; the first is {missing[0]!r}"
        )
    if extra := sorted(found - expected):
        raise ArtifactCorruptError(
            f"{path} holds {len(extra)} tensors that are not in the scheme; the first is {extra[0][:200]!r}"
        )


def _check_type(path: Path, name: str, found: StoredTensor, expected: TensorType, manifest: Manifest) -> None:
    # A cache-only recipe keeps the weights' floating type; beside quantized layers there is float32 only.
    is_open = not manifest.is_quantized and is_float_kind(expected[0]) and found.is_floating_point
    same_type = is_open or found.kind == expected[0]
    if not same_type or found.shape != expected[1]:
        raise ArtifactCorruptError(
            f"{path}: tensor {name!r} is {torch_name(found.kind)} {found.shape}, the scheme "
            f"{manifest.recipe.name} says {torch_name(expected[0])} {expected[1]}"
        )


def _values(file: Path, header: Header) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Yield the tensors of a file by name, sorted, as read-only arrays; bfloat16 is widened to float32."""
    if not header.tensors:
        return
    start = file.stat().st_size - max(tensor.end for tensor in header.tensors.values())
    data = np.memmap(file, mode="r")
    for name, tensor in sorted(header.tensors.items()):
        value = data[start + tensor.start : start + tensor.end].view(_NUMPY_TYPES[tensor.kind])
        if tensor.kind == "BF16":  # the upper half of a float32
            value = (value.astype("<u4") << 16).view("<f4")
        yield name, value.reshape(tensor.shape)


def _check_codes(
    path: Path, name: str, value: NDArray[np.generic], layer: LayerScheme, unet: Network
) -> None:
    module: Any = unet.get_submodule(layer.name)
    if fault := fault_of(value, module.weight.numel(), bits=layer.weight_bits):
        raise ArtifactCorruptError(f"{path}: tensor {name!r} {fault}; deploy again")


def _check_values(path: Path, name: str, value: NDArray[Any]) -> None:
    if value.dtype.kind != "f":
        return
    if not bool(np.isfinite(value).all()):
        raise ArtifactCorruptError(f"{path}: tensor {name!r} holds NaN or infinity")
    if name.endswith(_SCALES):
        _check_scales(path, name, value)


def _check_scales(path: Path, name: str, value: NDArray[Any]) -> None:
    if not bool((value > 0).all()):
        raise ArtifactCorruptError(f"{path}: tensor {name!r} holds a scale that is not positive")
    code = _LARGEST_CODE[f".{name.rpartition('.')[2]}"]
    with np.errstate(over="ignore"):
        is_finite = bool(np.isfinite(value * code).all())
    if not is_finite:
        raise ArtifactCorruptError(f"{path}: tensor {name!r} holds a scale that makes code {code} infinite")
