"""The kernels of the CPU: what each serves, and the reasons not to use it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from errata.deploy.cpu import attention_kernel, int8, native, vnni
from errata.deploy.cpu.attention import CPUAttention
from errata.deploy.cpu.fusion import fuse
from errata.deploy.cpu.int8 import Int8Layer, OneDNNProduct, OneDNNQuantizer, StepTable
from errata.deploy.cpu.vnni import VNNIProduct
from errata.deploy.kernel_registry import (
    AttentionKernel,
    AttentionRequest,
    BackendRow,
    LayerKernel,
    LayerRequest,
    register_attention_kernel,
    register_kernel,
)
from errata.deploy.reference import FLOAT_INPUT, WeightOnlyLayer
from errata.runtime.attention import QuantizedAttention
from errata.runtime.step_context import StepContext
from errata.runtime.weight_formats import weight_format

# With the 1 to 4 channels of the first convolution the int8 product has too little to do, and quantizing the
# input costs more than it saves.
_FEWEST_CHANNELS = 16
# The instructions that the kernel is named for.
_USUAL = "AVX512-VNNI"


def _int8_obstacle(_: torch.device) -> str:
    return "" if int8.is_available() else "this CPU has no VNNI instructions: int8 products would saturate"


def _onednn_obstacle(device: torch.device) -> str:
    if (reason := _int8_obstacle(device)) or int8.has_onednn():
        return reason
    return "this CPU has no VNNI instructions that oneDNN uses: its products would saturate"


def _int8_reason(request: LayerRequest) -> str:
    stored_as = weight_format(request.scheme.weight_bits)
    if stored_as.is_packed:
        return f"{stored_as.name} weights are unpacked to int8 at load"
    return "int8 kernel available"


def _own_reason(request: LayerRequest) -> str:
    named = native.product_name()
    return _int8_reason(request) + ("" if named in ("", _USUAL) else f", by {named}")


def _too_few(channels: int) -> str:
    if channels >= _FEWEST_CHANNELS:
        return ""
    return f"too few channels for int8 to be faster: {channels}, and it needs {_FEWEST_CHANNELS}"


def _fuse(unet: nn.Module, rows: list[BackendRow], context: StepContext) -> None:
    fused = fuse(unet, context)
    for place, row in enumerate(rows):
        if row.layer in fused:
            rows[place] = replace(row, reason=f"{row.reason}; {fused[row.layer]}")


def _step_tables(request: LayerRequest | AttentionRequest) -> list[StepTable]:
    return [
        StepTable(request.tensors[f"{site}.scale"], request.tensors[f"{site}.zero_point"], request.context)
        for site in request.sites
    ]


def _int8_layer(request: LayerRequest, product: type[VNNIProduct | OneDNNProduct]) -> nn.Module:
    return Int8Layer(
        request.scheme,
        request.geometry,
        request.codes(),
        request.weight_scale,
        request.bias,
        _step_tables(request),
        product=product,
    )


# Errata's own kernel. It is fast for layers with few output channels too.
VNNI = register_kernel(
    LayerKernel(
        name="vnni",
        rank=20,
        devices=("cpu",),
        backends=("auto", "vnni"),
        obstacle=lambda device: _int8_obstacle(device) or native.product_obstacle(),
        refusal=lambda request: vnni.obstacle(
            request.geometry, request.module.weight.shape, request.scheme.input_widths
        ),
        reason=_own_reason,
        build=lambda request: _int8_layer(request, VNNIProduct),
        finish=_fuse,
    )
)
# With `backend="vnni"` it serves the layers that the kernel above refuses.
ONEDNN = register_kernel(
    LayerKernel(
        name="onednn",
        rank=10,
        devices=("cpu",),
        backends=("auto", "onednn", "vnni"),
        obstacle=_onednn_obstacle,
        drawback=lambda request: _too_few(min(request.module.weight.shape[0], *request.scheme.input_widths)),
        reason=_int8_reason,
        build=lambda request: _int8_layer(request, OneDNNProduct),
        finish=_fuse,
    )
)
WEIGHT_ONLY = register_kernel(
    LayerKernel(
        name="weight only",
        rank=5,
        devices=("cpu",),
        bits=(None,),
        reason=lambda request: f"{FLOAT_INPUT}; codes dequantized at each call",
        build=lambda request: WeightOnlyLayer(
            request.scheme, request.geometry, request.codes(), request.weight_scale, request.bias
        ),
    )
)


def _on_grid(request: AttentionRequest) -> QuantizedAttention:
    query, key, value, probabilities = (OneDNNQuantizer(table) for table in _step_tables(request))
    return QuantizedAttention(query=query, key=key, value=value, probabilities=probabilities)


def _float_reason(_: AttentionRequest) -> str:
    kinds = attention_kernel.attention_kinds()
    where = f", {kinds[0].description}" if kinds else ""
    return f"query, key, value and softmax output stay in floating point, more precise than the scheme{where}"


FUSED_ATTENTION = register_attention_kernel(
    AttentionKernel(
        name="fused float",
        rank=20,
        devices=("cpu",),
        backends=("auto",),
        obstacle=_int8_obstacle,
        reason=_float_reason,
        build=lambda request: CPUAttention(),
    )
)
FLOAT_ATTENTION = register_attention_kernel(
    AttentionKernel(
        name="float",
        rank=10,
        devices=("cpu",),
        backends=("onednn", "vnni"),
        obstacle=_int8_obstacle,
        reason=lambda request: "inputs are quantized to 8 bits, products are in floating point",
        build=_on_grid,
    )
)
