"""The kernels that errata brings, put into a network: each layer gets the one that the registry chooses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

# Importing them registers their kernels.
from errata.deploy import reference as _reference
from errata.deploy.cpu import kernels as _cpu
from errata.deploy.cuda import installing as _cuda
from errata.deploy.kernel_registry import (
    AttentionRequest,
    BackendRow,
    LayerRequest,
    backend_names,
    choose_attention_kernel,
    choose_layer_kernel,
    layer_kernels,
)
from errata.runtime.attention import QuantizedAttention
from errata.runtime.feature_correction import correct_outputs
from errata.runtime.replacement import replace_layers
from errata.runtime.scheme import AttentionScheme, LayerScheme, Scheme
from errata.runtime.step_context import StepContext

__all__ = ["BACKENDS", "BackendRow", "finish", "install"]

OURS = (_reference, _cpu, _cuda)
BACKENDS = backend_names()


def install(
    unet: nn.Module,
    scheme: Scheme,
    tensors: Mapping[str, Tensor],
    *,
    context: StepContext,
    backend: str,
    device: torch.device,
) -> list[BackendRow]:
    """Put runtime layers into `unet` (in place) for its float ones; return the report.

    Call `finish` when the network has its other parameters, too.
    """
    rows: list[BackendRow] = []

    def layer(described: LayerScheme, module: nn.Conv2d | nn.Linear) -> nn.Module:
        request = LayerRequest(
            scheme=described, module=module, tensors=tensors, context=context, device=device, backend=backend
        )
        kernel, reason = choose_layer_kernel(request)
        rows.append(_row(described.name, described.kind, described.label(), kernel.name, reason))
        return kernel.build(request)

    def attention(products: AttentionScheme) -> QuantizedAttention:
        request = AttentionRequest(
            scheme=products, tensors=tensors, context=context, device=device, backend=backend
        )
        kernel, reason = choose_attention_kernel(request)
        name = f"{products.name} (matmuls)"
        rows.append(_row(name, "attention", f"a{products.bits}", kernel.name, reason))
        return kernel.build(request)

    replace_layers(unet, scheme, layer=layer, attention=attention)
    corrected = correct_outputs(unet, scheme, tensors, context=context, device=device)
    return [
        replace(row, reason=f"{row.reason}; output corrected in cached calls")
        if row.layer in corrected
        else row
        for row in rows
    ]


def finish(unet: nn.Module, rows: list[BackendRow], context: StepContext) -> None:
    """Let the kernels in use finish a network whose layers are all in place: in `unet` and `rows` itself."""
    used = {row.backend for row in rows}
    finishers = [kernel.finish for kernel in layer_kernels() if kernel.name in used and kernel.finish]
    for finisher in dict.fromkeys(finishers):
        finisher(unet, rows, context)


def _row(layer: str, kind: str, scheme: str, backend: str, reason: str) -> BackendRow:
    return BackendRow(layer=layer, kind=kind, scheme=scheme, backend=backend, reason=reason)
