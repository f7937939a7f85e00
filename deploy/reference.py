"""Layers that compute in floating point on dequantized codes; the reference kernels among them.

The reference kernels dequantize at load. They are right everywhere, and never faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from errata.deploy.kernel_registry import (
    AttentionKernel,
    AttentionRequest,
    LayerKernel,
    LayerRequest,
    register_attention_kernel,
    register_kernel,
)
from errata.runtime.attention import QuantizedAttention
from errata.runtime.layers import Geometry, per_output_channel
from errata.runtime.ranges import dequantize, quantize
from errata.runtime.scheme import LayerScheme
from errata.runtime.step_context import StepContext

FLOAT_INPUT = "the scheme keeps this input in floating point"
_BITS = 8


class ReferenceQuantizer(nn.Module):
    """Quantizer and dequantizer of an activation, with the scale and zero point of the current step.

    The arithmetic is that of the simulation (`errata.compress.quantize.quantizers`), operation by
    operation. The step is read from the context's tensor, so that what is compiled or captured serves every
    step.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, *, bits: int, context: StepContext) -> None:
        super().__init__()
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.float())
        self.bits = bits
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid of the current step, same shape and dtype."""
        step = self.context.step_on(x.device)
        # Scalars without a dimension: with one they would turn half precision into float32.
        scale, zero_point = (
            table.index_select(0, step).squeeze(0) for table in (self.scale, self.zero_point)
        )
        return dequantize(quantize(x, scale, zero_point, bits=self.bits), scale, zero_point)


class ReferenceLayer(nn.Module):
    """Convolution or linear layer with a dequantized weight and quantized input."""

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        quantizers: Sequence[ReferenceQuantizer],
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", dequantize_weight(codes, weight_scale, scheme.input_widths))
        self.register_buffer("bias", bias)
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; same shapes as the float layer."""
        if self.quantizers:
            x = self.geometry.quantize_parts(x, self.scheme.input_widths, self.quantizers)
        return self.geometry.apply(x, self.weight, self.bias)


class WeightOnlyLayer(nn.Module):
    """Layer that keeps the codes and dequantizes them at each call; its output is that of `ReferenceLayer`.

    In memory a quarter of that; such a layer has few rows, so it costs microseconds.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.codes: Tensor
        self.weight_scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("codes", codes.clone())  # what is loaded is mapped from a file
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; same shapes as the float layer."""
        weight = dequantize_weight(self.codes, self.weight_scale, self.scheme.input_widths)
        return self.geometry.apply(x, weight, self.bias)


def dequantize_weight(codes: Tensor, scales: Tensor, input_widths: tuple[int, ...]) -> Tensor:
    """Return the float32 weight that the codes stand for: each code times its output channel's scale.

    The simulation (`errata.compress.quantize.simulation`) takes it from torchao; both agree to the last bit.

    Args:
        codes: int8, `(O, I)` or `(O, I, kh, kw)`.
        scales: float32, `(P, O)`: one row for each part of the input.
        input_widths: input channels of each part.
    """
    parts = [
        part.float() * per_output_channel(scale, codes.ndim)
        for part, scale in zip(codes.split(list(input_widths), dim=1), scales, strict=True)
    ]
    return torch.cat(parts, dim=1).contiguous()


def reference_quantizers(request: LayerRequest | AttentionRequest) -> list[ReferenceQuantizer]:
    """Return one quantizer for each site of a layer or attention, on its device."""
    return [
        ReferenceQuantizer(
            request.tensors[f"{site}.scale"],
            request.tensors[f"{site}.zero_point"],
            bits=_BITS,
            context=request.context,
        ).to(request.device)
        for site in request.sites
    ]


def _reference_layer(request: LayerRequest) -> nn.Module:
    return ReferenceLayer(
        request.scheme,
        request.geometry,
        request.codes(),
        request.weight_scale,
        request.bias,
        reference_quantizers(request),
    ).to(request.device)


def _reference_attention(request: AttentionRequest) -> QuantizedAttention:
    query, key, value, probabilities = reference_quantizers(request)
    return QuantizedAttention(query=query, key=key, value=value, probabilities=probabilities)


REFERENCE = register_kernel(
    LayerKernel(
        name="reference",
        rank=0,
        bits=(8, None),
        reason=lambda request: FLOAT_INPUT if request.bits is None else "",
        build=_reference_layer,
    )
)
REFERENCE_ATTENTION = register_attention_kernel(
    AttentionKernel(
        name="reference",
        rank=0,
        reason=lambda request: "inputs are quantized to 8 bits, products are in floating point",
        build=_reference_attention,
    )
)
