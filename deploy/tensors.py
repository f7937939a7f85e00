"""Which tensors an artifact's denoiser files hold: exactly these, of these types, shapes and ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from errata.deploy.manifest import Manifest
from errata.deploy.safetensors_header import StoredTensor, read_header
from errata.errors import ArtifactCorruptError
from errata.runtime.layers import float_layer
from errata.runtime.output_map import OUTPUT_MAP
from errata.runtime.scheme import CacheCorrection, LayerScheme, Scheme, layer_sites
from errata.runtime.weight_formats import weight_format

TensorType = tuple[torch.dtype, tuple[int, ...]]

_SCALES = (".scale", ".weight_scale")
# The largest code by which a scale is multiplied: of an input, or of a weight.
_LARGEST_CODE = {".scale": 255, ".weight_scale": 127}


def expected_tensors(unet: nn.Module, scheme: Scheme, *, num_steps: int) -> dict[str, TensorType]:
    """Return type and shape of every tensor of the file, by name.

    `unet` is the float network, possibly on the meta device. Float parameters that are not quantized appear
    with its dtype; a cache-only artifact may hold them in another floating-point one.
    """
    expected: dict[str, TensorType] = {}
    for layer in scheme.layers:
        module = float_layer(unet, layer.name)
        expected |= _layer_tensors(layer, module.weight.shape, module.bias is not None)
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
        expected[matrix] = (torch.float32, (num_steps, channels, channels))
        expected[bias] = (torch.float32, (num_steps, channels))
    for name, parameter in float_parameters(unet, scheme).items():
        expected[name] = (parameter.dtype, tuple(parameter.shape))
    return expected


def float_parameters(unet: nn.Module, scheme: Scheme) -> dict[str, Tensor]:
    """Return the parameters and buffers of the float network that stay: all but those of quantized layers."""
    quantized = tuple(f"{layer.name}." for layer in scheme.layers)
    return {
        name: value for name, value in unet.state_dict().items() if not name.startswith(quantized or ("\0",))
    }


def stored_tensors(unet: nn.Module, scheme: Scheme, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors to write: packed codes, scales, zero points, biases, small float parameters."""
    stored = {
        name: value.detach().cpu().contiguous() for name, value in float_parameters(unet, scheme).items()
    }
    if scheme.layers:  # beside quantized layers everything computes in float32
        stored = {name: _in_float32(value) for name, value in stored.items()}
    stored |= {name: value.contiguous() for name, value in table.items()}
    for layer in scheme.layers:
        bias = table.get(f"{layer.name}.bias", float_layer(unet, layer.name).bias)
        if bias is not None:
            stored[f"{layer.name}.bias"] = bias.detach().float().cpu().contiguous()
        codes = weight_format(layer.weight_bits).pack(table[f"{layer.name}.codes"])
        stored[f"{layer.name}.codes"] = codes.contiguous()
    return stored


def read_codes(layer: LayerScheme, tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """Return the int8 codes of a layer, `shape` being that of its weight."""
    return weight_format(layer.weight_bits).unpack(tensors[f"{layer.name}.codes"], shape)


def _in_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _layer_tensors(layer: LayerScheme, shape: torch.Size, has_bias: bool) -> dict[str, TensorType]:
    stored_as = weight_format(layer.weight_bits)
    tensors: dict[str, TensorType] = {
        f"{layer.name}.codes": (stored_as.dtype, stored_as.stored_shape(shape)),
        f"{layer.name}.weight_scale": (torch.float32, (len(layer.input_widths), shape[0])),
    }
    if has_bias:
        tensors[f"{layer.name}.bias"] = (torch.float32, (shape[0],))
    return tensors


def _correction_tensors(correction: CacheCorrection, num_steps: int) -> dict[str, TensorType]:
    channels = {("cache", "gain", "shift"): correction.feature_channels}
    channels |= {(layer.name, "output_gain", "output_shift"): layer.channels for layer in correction.layers}
    return {
        f"{name}.{kind}": (torch.float32, (num_steps, width))
        for (name, *kinds), width in channels.items()
        for kind in kinds
    }


def _site_tensors(name: str, num_steps: int) -> dict[str, TensorType]:
    return {f"{name}.scale": (torch.float32, (num_steps,)), f"{name}.zero_point": (torch.uint8, (num_steps,))}


def check_denoiser(files: Sequence[Path], unet: nn.Module, manifest: Manifest) -> None:
    """Compare headers, then values, with what the scheme says for this network.

    Raises:
        ArtifactCorruptError: naming the file and the tensor.
        OSError: a file cannot be read.
    """
    expected = expected_tensors(unet, manifest.scheme, num_steps=manifest.schedule.num_steps)
    places: dict[str, Path] = {}
    for file in files:
        header = read_header(file)
        if header.metadata:
            raise ArtifactCorruptError(f"{file} has metadata, which the format does not allow; deploy again")
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
    coded = {f"{layer.name}.codes": layer for layer in manifest.scheme.layers}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                value = opened.get_tensor(name)
                if name in coded:
                    _check_codes(file, name, value, coded[name], unet)
                _check_values(file, name, value)


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
    is_open = not manifest.is_quantized and expected[0].is_floating_point and found.dtype.is_floating_point
    same_type = is_open or found.dtype == expected[0]
    if not same_type or found.shape != expected[1]:
        raise ArtifactCorruptError(
            f"{path}: tensor {name!r} is {found.dtype} {found.shape}, the scheme {manifest.recipe.name} says "
            f"{expected[0]} {expected[1]}"
        )


def _check_codes(path: Path, name: str, value: Tensor, layer: LayerScheme, unet: nn.Module) -> None:
    count = float_layer(unet, layer.name).weight.numel()
    if fault := weight_format(layer.weight_bits).fault(value, count):
        raise ArtifactCorruptError(f"{path}: tensor {name!r} {fault}; deploy again")


def _check_values(path: Path, name: str, value: Tensor) -> None:
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
