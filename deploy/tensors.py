"""Which tensors an artifact's denoiser file holds: exactly these, with these types and shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from errata.deploy.packing import pack_int4, packed_bytes, unpack_int4
from errata.runtime.layers import float_layer
from errata.runtime.scheme import CacheCorrection, LayerScheme, Scheme, layer_sites

TensorType = tuple[torch.dtype, tuple[int, ...]]


def expected_tensors(unet: nn.Module, scheme: Scheme, *, num_steps: int) -> dict[str, TensorType]:
    """Type and shape of every tensor of the file, by name.

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
    for name, parameter in float_parameters(unet, scheme).items():
        expected[name] = (parameter.dtype, tuple(parameter.shape))
    return expected


def float_parameters(unet: nn.Module, scheme: Scheme) -> dict[str, Tensor]:
    """Parameters and buffers of the float network that stay: all but those of quantized layers."""
    quantized = tuple(f"{layer.name}." for layer in scheme.layers)
    return {
        name: value for name, value in unet.state_dict().items() if not name.startswith(quantized or ("\0",))
    }


def stored_tensors(unet: nn.Module, scheme: Scheme, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to write: packed codes, scales, zero points, biases and the small float parameters."""
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
        if layer.weight_bits == 4:
            stored[f"{layer.name}.codes"] = pack_int4(table[f"{layer.name}.codes"])
    return stored


def read_codes(layer: LayerScheme, tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """Int8 codes of a layer, `shape` being that of its weight."""
    codes = tensors[f"{layer.name}.codes"]
    return unpack_int4(codes, shape) if layer.weight_bits == 4 else codes


def odd_packed_codes(unet: nn.Module, scheme: Scheme) -> set[str]:
    """Names of the packed codes whose last byte holds one code only."""
    return {
        f"{layer.name}.codes"
        for layer in scheme.layers
        if layer.weight_bits == 4 and float_layer(unet, layer.name).weight.numel() % 2
    }


def _in_float32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _layer_tensors(layer: LayerScheme, shape: torch.Size, has_bias: bool) -> dict[str, TensorType]:
    codes: TensorType = (torch.int8, tuple(shape))
    if layer.weight_bits == 4:
        codes = (torch.uint8, (packed_bytes(shape.numel()),))
    tensors: dict[str, TensorType] = {
        f"{layer.name}.codes": codes,
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
