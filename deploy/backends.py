"""Which kernel runs which layer, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from errata.deploy import cuda
from errata.deploy.cpu import int8, native, vnni
from errata.deploy.cpu.attention import CPUAttention
from errata.deploy.cpu.int8 import Int8Layer, OneDNNQuantizer, StepTable
from errata.deploy.cpu.weight_only import WeightOnlyLayer
from errata.deploy.reference import ReferenceLayer, ReferenceQuantizer
from errata.deploy.tensors import read_codes
from errata.errors import ArtifactError
from errata.runtime.attention import QuantizedAttention, set_attention
from errata.runtime.feature_correction import correct_outputs
from errata.runtime.layers import Geometry, float_layer, replace_module
from errata.runtime.scheme import AttentionScheme, LayerScheme, Scheme, layer_sites
from errata.runtime.step_context import StepContext

BACKENDS = ("auto", "reference", "vnni", "onednn", "triton")
# Those of int8 layers on the CPU.
CPU_INT8 = ("vnni", "onednn")
# With the 1 to 4 channels of the first convolution the int8 product has too little to do, and quantizing the
# input costs more than it saves.
_FEWEST_CHANNELS = 16


@dataclass(frozen=True, kw_only=True)
class BackendRow:
    """One line of `DeployedPipeline.backend_report()`."""

    layer: str
    kind: str
    scheme: str
    backend: str
    reason: str


def check_backend(backend: str, device: torch.device) -> None:
    """Refuses a backend that is unknown or cannot run here.

    Raises:
        ArtifactError: with what is allowed.
    """
    if backend not in BACKENDS:
        raise ArtifactError(f"unknown backend {backend!r}; allowed are {', '.join(BACKENDS)}")
    if backend in CPU_INT8 and (obstacle := _int8_obstacle(device)):
        raise ArtifactError(f"backend {backend!r} cannot run: {obstacle}; use backend='auto' or 'reference'")
    if backend == "vnni" and (obstacle := native.product_obstacle()):
        raise ArtifactError(f"backend 'vnni' cannot run: {obstacle}; use backend='auto' or 'onednn'")
    if backend == "triton" and (obstacle := cuda.obstacle(device, backend)):
        raise ArtifactError(f"backend 'triton' cannot run: {obstacle}; use backend='auto' or 'reference'")


def install(
    unet: nn.Module,
    scheme: Scheme,
    tensors: Mapping[str, Tensor],
    *,
    context: StepContext,
    backend: str,
    device: torch.device,
) -> list[BackendRow]:
    """Puts runtime layers into `unet` (in place) in the place of its float ones; returns the report."""
    rows: list[BackendRow] = []
    for layer in scheme.layers:
        module = float_layer(unet, layer.name)
        chosen, reason = _choose(layer, module, backend, device)
        replace_module(unet, layer.name, _runtime_layer(module, layer, tensors, context, chosen, device))
        rows.append(
            BackendRow(layer=layer.name, kind=layer.kind, scheme=layer.label(), backend=chosen, reason=reason)
        )
    for attention in scheme.attentions:
        rows.append(_install_attention(unet, attention, tensors, context, backend, device))
    corrected = correct_outputs(unet, scheme, tensors, context=context, device=device)
    rows = [
        replace(row, reason=f"{row.reason}; output corrected in cached calls")
        if row.layer in corrected
        else row
        for row in rows
    ]
    cuda.follow_choices(unet, rows)
    return rows


def _choose(
    layer: LayerScheme, module: nn.Conv2d | nn.Linear, backend: str, device: torch.device
) -> tuple[str, str]:
    if backend == "reference":
        return "reference", "asked for"
    if layer.activation_bits is None:
        kept = "the scheme keeps this input in floating point"
        is_here = device.type == "cpu"
        return ("weight only", f"{kept}; codes dequantized at each call") if is_here else ("reference", kept)
    if _is_on_cuda_kernels(backend, device):
        return ("triton", "asked for") if backend == "triton" else ("cuda", cuda.UNCHOSEN)
    if obstacle := _int8_obstacle(device):
        return "reference", obstacle
    if backend == "onednn":
        return "onednn", "asked for"
    if backend == "vnni":
        return _cpu_kernel(layer, module, "asked for")
    # The project's own kernel takes few outputs well, oneDNN's does not.
    is_own = not vnni.obstacle(Geometry(module), module.weight.shape, layer.input_widths)
    narrowest = min(layer.input_widths) if is_own else min(module.weight.shape[0], *layer.input_widths)
    if narrowest < _FEWEST_CHANNELS:
        return "reference", f"{narrowest} channels: too small for int8 to be faster"
    if layer.weight_bits == 4:
        return _cpu_kernel(layer, module, "int4 weights are unpacked to int8 at load")
    return _cpu_kernel(layer, module, "int8 kernel available")


def _cpu_kernel(layer: LayerScheme, module: nn.Conv2d | nn.Linear, reason: str) -> tuple[str, str]:
    """The project's own kernel, or oneDNN's where that cannot compute the layer."""
    if obstacle := vnni.obstacle(Geometry(module), module.weight.shape, layer.input_widths):
        return "onednn", f"{reason}; not vnni: {obstacle}"
    return "vnni", reason


def _is_on_cuda_kernels(backend: str, device: torch.device) -> bool:
    return backend in ("auto", "triton") and not cuda.obstacle(device, backend)


def _int8_obstacle(device: torch.device) -> str:
    if device.type != "cpu":
        return f"no int8 kernel for {device.type} in this version"
    if not int8.is_available():
        return "this CPU has no VNNI instructions: int8 products would saturate"
    return ""


def _runtime_layer(
    module: nn.Conv2d | nn.Linear,
    layer: LayerScheme,
    tensors: Mapping[str, Tensor],
    context: StepContext,
    backend: str,
    device: torch.device,
) -> nn.Module:
    codes = read_codes(layer, tensors, module.weight.shape)
    weight_scale = tensors[f"{layer.name}.weight_scale"]
    bias = tensors.get(f"{layer.name}.bias")
    names = [site.name for site in layer_sites(layer)]
    if backend in CPU_INT8:
        tables = [_step_table(name, tensors, context) for name in names]
        return Int8Layer(layer, Geometry(module), codes, weight_scale, bias, tables, kernel=backend)
    if backend == "weight only":
        return WeightOnlyLayer(layer, Geometry(module), codes, weight_scale, bias)
    if backend in ("cuda", "triton"):
        asked = "auto" if backend == "cuda" else backend
        return cuda.runtime_layer(
            module, layer, codes, tensors, context=context, backend=asked, device=device
        )
    quantizers = [_reference_quantizer(name, tensors, context) for name in names]
    return ReferenceLayer(layer, Geometry(module), codes, weight_scale, bias, quantizers).to(device)


def _install_attention(
    unet: nn.Module,
    attention: AttentionScheme,
    tensors: Mapping[str, Tensor],
    context: StepContext,
    backend: str,
    device: torch.device,
) -> BackendRow:
    is_fused = backend == "auto" and (_is_on_cuda_kernels(backend, device) or not _int8_obstacle(device))
    if backend in ("reference", "triton") or _int8_obstacle(device):
        chosen, reason = "reference", "inputs on the 8-bit grid, float products"
        quantizers: list[nn.Module] = [
            _reference_quantizer(name, tensors, context).to(device) for name in attention.sites
        ]
    else:
        chosen, reason = "float", "inputs on the 8-bit grid, float products"
        quantizers = [OneDNNQuantizer(_step_table(name, tensors, context)) for name in attention.sites]
    query, key, value, probabilities = quantizers
    processor = QuantizedAttention(query=query, key=key, value=value, probabilities=probabilities)
    if is_fused and device.type == "cpu":
        chosen = "fused float"
        reason = "query, key, value and softmax output in floating point, above the scheme"
        processor = CPUAttention()
    elif is_fused:
        chosen = "fused float"
        reason = "query, key, value on the 8-bit grid; softmax output in floating point, above the scheme"
        processor = QuantizedAttention(query=query, key=key, value=value, probabilities=None)
    set_attention(unet, attention.name, processor)
    return BackendRow(
        layer=f"{attention.name} (matmuls)",
        kind="attention",
        scheme=f"a{attention.bits}",
        backend=chosen,
        reason=reason,
    )


def _step_table(name: str, tensors: Mapping[str, Tensor], context: StepContext) -> StepTable:
    return StepTable(tensors[f"{name}.scale"], tensors[f"{name}.zero_point"], context)


def _reference_quantizer(
    name: str, tensors: Mapping[str, Tensor], context: StepContext
) -> ReferenceQuantizer:
    return ReferenceQuantizer(
        tensors[f"{name}.scale"], tensors[f"{name}.zero_point"], bits=8, context=context
    )
