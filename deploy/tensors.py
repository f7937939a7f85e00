"""The tensors of an artifact's denoiser: what is written, and codes read back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from errata.deploy.safetensors_header import torch_type
from errata.deploy.tensor_check import expected_types, float_parameters
from errata.runtime.layers import float_layer
from errata.runtime.scheme import LayerScheme, Scheme
from errata.runtime.weight_formats import weight_format


def expected_tensors(
    unet: nn.Module, scheme: Scheme, *, num_steps: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return type and shape of every tensor of the file, by name, see `tensor_check.expected_types`."""
    types = expected_types(unet, scheme, num_steps=num_steps)
    return {name: (torch_type(kind), shape) for name, (kind, shape) in types.items()}


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
