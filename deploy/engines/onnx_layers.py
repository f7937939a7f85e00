"""Layers of a network that is written as ONNX, with scales gathered by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from errata.deploy.engines.onnx_nodes import Dequantized, QuantizedMatMul, QuantizedProduct, Windows
from errata.runtime.attention import QuantizedAttention
from errata.runtime.layers import Geometry
from errata.runtime.scheme import LayerScheme, layer_sites
from errata.runtime.step_context import StepContext


class StepTables(nn.Module):
    """Scale and zero point of an activation at every step, `(T,)` each, and the step context."""

    def __init__(self, site: str, tensors: Mapping[str, Tensor], context: StepContext) -> None:
        super().__init__()
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", tensors[f"{site}.scale"])
        self.register_buffer("zero_point", tensors[f"{site}.zero_point"])
        self.context = context

    def now(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the current step, float32."""
        return self.scale[self.context.step], self.zero_point[self.context.step].float()


def weight_parts(
    scheme: LayerScheme, codes: Tensor, tensors: Mapping[str, Tensor], context: StepContext
) -> Iterator[tuple[Tensor, Tensor, StepTables]]:
    """Return codes and scales of the weight and tables of the input, part by part."""
    return zip(
        codes.split(list(scheme.input_widths), dim=1),
        tensors[f"{scheme.name}.weight_scale"],
        (StepTables(site.name, tensors, context) for site in layer_sites(scheme)),
        strict=True,
    )


class GatheredPart(nn.Module):
    """The product of one part of an input, `(B, I, H, W)` or `(…, I)`, with the weight of that part."""

    def __init__(self, geometry: Geometry, codes: Tensor, weight_scale: Tensor, tables: StepTables) -> None:
        super().__init__()
        self.codes: Tensor
        self.weight_scale: Tensor
        self.windows: Windows | None = None
        rows = codes.T if codes.ndim == 2 else codes.permute(2, 3, 1, 0).flatten(0, 2)
        if geometry.is_conv:
            self.windows = Windows(
                kernel=(codes.shape[2], codes.shape[3]),
                stride=tuple(geometry.stride),
                padding=tuple(geometry.padding),
                dilation=tuple(geometry.dilation),
            )
        self.register_buffer("codes", rows.contiguous())
        self.register_buffer("weight_scale", weight_scale.contiguous())
        self.tables = tables

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product at the current step."""
        tables = self.tables
        result: Tensor = QuantizedProduct.apply(
            x,
            tables.context.step,
            tables.scale,
            tables.zero_point,
            self.codes,
            self.weight_scale,
            bias,
            self.windows,
            sizes_of(x),
        )
        return result


PartMaker = Callable[[Geometry, Tensor, Tensor, StepTables], nn.Module]


class EngineLayer(nn.Module):
    """Convolution or linear layer; a concatenated input has two parts.

    `part` makes the product of one part: `GatheredPart` on uint8 inputs and int8 weights, or another form.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        codes: Tensor,
        tensors: Mapping[str, Tensor],
        context: StepContext,
        *,
        part: PartMaker,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.bias: Tensor | None
        self.register_buffer("bias", tensors.get(f"{scheme.name}.bias"))
        self.parts = nn.ModuleList(
            part(geometry, *given) for given in weight_parts(scheme, codes, tensors, context)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; same shapes as the float layer."""
        inputs = self.geometry.split(x, self.scheme.input_widths) if len(self.parts) > 1 else (x,)
        (first, given), *others = zip(self.parts, inputs, strict=True)
        output: Tensor = first(given, self.bias)
        for part, given in others:
            output = output + part(given, None)
        return output


class WeightOnlyEngineLayer(nn.Module):
    """Convolution or linear layer with int8 weights, dequantized at each call, and float inputs."""

    def __init__(
        self, scheme: LayerScheme, geometry: Geometry, codes: Tensor, tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.codes: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        (scale,) = tensors[f"{scheme.name}.weight_scale"]  # only concatenated inputs have two parts
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("bias", tensors.get(f"{scheme.name}.bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; same shapes as the float layer."""
        return self.geometry.apply(x, Dequantized.apply(self.codes, self.scale), self.bias)


class EngineAttention(QuantizedAttention):
    """The same attention, its two products in int8."""

    def __init__(
        self, *, query: StepTables, key: StepTables, value: StepTables, probabilities: StepTables
    ) -> None:
        # The products quantize what they read.
        unchanged = nn.Identity()
        super().__init__(query=unchanged, key=unchanged, value=unchanged, probabilities=unchanged)
        self.tables: Any = nn.ModuleDict(
            {"query": query, "key": key, "value": value, "probabilities": probabilities}
        )

    def _attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))
        scores = self._product("query", query, "key", key, is_transposed=True)
        probabilities = _softmax(attn, scores, mask)
        output = self._product("probabilities", probabilities, "value", value, is_transposed=False)
        return attn.batch_to_head_dim(output)

    def _product(self, left: str, x: Tensor, right: str, y: Tensor, *, is_transposed: bool) -> Tensor:
        of_x, of_y = self.tables[left], self.tables[right]
        result: Tensor = QuantizedMatMul.apply(
            x,
            y,
            of_x.context.step,
            of_x.scale,
            of_x.zero_point,
            of_y.scale,
            of_y.zero_point,
            is_transposed,
            (sizes_of(x)[1], sizes_of(y)[1 if is_transposed else 2]),
        )
        return result


def attend(
    attn: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    on_grid: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute attention without the empty matrix that `baddbmm` reads, which a graph would fill and add."""
    query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))
    probabilities = on_grid(_softmax(attn, torch.bmm(query, key.transpose(1, 2)), mask))
    return attn.batch_to_head_dim(torch.bmm(probabilities, value))


def _softmax(attn: Attention, scores: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores * attn.scale
    return (scores if mask is None else scores + mask).softmax(dim=-1)


def sizes_of(x: Tensor) -> tuple[int, ...]:
    """Return plain numbers, also while a network is traced."""
    return tuple(int(size) for size in x.shape)
