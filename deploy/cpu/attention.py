"""Attention between int8 projections: only their inputs are quantized, above the precision of the scheme."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from errata.deploy.cpu.int8 import Int8Layer
from errata.deploy.cpu.norms import normed_codes_of_each
from errata.runtime.attention import QuantizedAttention

# Width of a head from which two products in bfloat16 are faster than the fused kernel in float32.
_WIDE_HEAD = 128


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for it; emulated, it would be slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


class CPUAttention(QuantizedAttention):
    """Query, key, value and the softmax output stay in floating point.

    One quantization serves all projections that read the same input. Wide heads are multiplied in bfloat16,
    which rounds to 2^-9 of a value; the 8-bit grids of the scheme round to 2^-9 of a range.
    """

    def __init__(self) -> None:
        super().__init__(query=_as_it_is, key=_as_it_is, value=_as_it_is, probabilities=None)
        self._has_bfloat16 = multiplies_bfloat16()

    @torch.compiler.disable
    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """See `QuantizedAttention.forward`."""
        if encoder_hidden_states is not None or attention_mask is not None or not _is_of_pixels(attn):
            return super().forward(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        layers = (attn.to_q, attn.to_k, attn.to_v)
        codes = normed_codes_of_each(hidden_states, attn.group_norm, layers)
        dtype = torch.bfloat16 if self._rounds(attn.inner_dim // attn.heads) else torch.float32
        query, key, value = (
            layer.product([read.permute(0, 2, 3, 1).flatten(1, 2)], layer.bias, dtype=dtype)
            for layer, read in zip(layers, codes, strict=True)
        )
        output = self._attend(attn, query, key, value, None)
        residual = hidden_states.permute(0, 2, 3, 1).flatten(1, 2) if attn.residual_connection else None
        output = _plus(attn.to_out[0], output, residual)
        output = output.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return output if attn.rescale_output_factor == 1 else output.div_(attn.rescale_output_factor)

    def _rounds(self, width: int) -> bool:
        """Return whether heads of that width are multiplied in bfloat16."""
        return self._has_bfloat16 and width >= _WIDE_HEAD

    def _quantized_inputs(
        self, attn: Attention, hidden_states: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if attn.norm_cross or attn.norm_q is not None or attn.norm_k is not None:
            return super()._quantized_inputs(attn, hidden_states, context)
        if context is None:
            query, key, value = _projected(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            (query,) = _projected(hidden_states, attn.to_q)
            key, value = _projected(context, attn.to_k, attn.to_v)
        return query, key, value

    def _attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        if mask is not None or not self._rounds(query.shape[-1] // attn.heads):
            return super()._attend(attn, query, key, value, mask)
        query, key, value = (
            attn.head_to_batch_dim(x) for x in (query.bfloat16(), key.bfloat16(), value.bfloat16())
        )
        scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=attn.scale)
        output = torch.bmm(scores.softmax(dim=-1), value)
        return attn.batch_to_head_dim(output).float()


def _is_of_pixels(attn: Attention) -> bool:
    """Return whether it attends over an image, normalized by groups, with int8 projections."""
    return (
        isinstance(attn.group_norm, nn.GroupNorm)
        and attn.spatial_norm is None
        and attn.norm_q is None
        and attn.norm_k is None
        and all(
            isinstance(layer, Int8Layer) and len(layer.tables) == 1
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
    )


def _projected(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return `x` through each of the layers, quantized once where they quantize alike."""
    first = layers[0]
    if not isinstance(first, Int8Layer) or not _share_an_input(*layers):
        return [layer(x) for layer in layers]
    codes = first.quantized([x])
    return [layer.product(codes, layer.bias) for layer in layers if isinstance(layer, Int8Layer)]


def _plus(layer: nn.Module, x: Tensor, added: Tensor | None) -> Tensor:
    """Return `layer(x)` plus `added`, free to be changed."""
    if isinstance(layer, Int8Layer):
        return layer.product(layer.quantized([x]), layer.bias, added)
    output: Tensor = layer(x)
    return output if added is None else output + added


def _share_an_input(*layers: nn.Module) -> bool:
    """Return whether all are int8 layers that quantize their input, of one part, alike at every step."""
    first = layers[0]
    return isinstance(first, Int8Layer) and all(
        isinstance(layer, Int8Layer) and len(layer.tables) == 1 and layer.tables[0].equals(first.tables[0])
        for layer in layers
    )


def _as_it_is(x: Tensor) -> Tensor:
    return x
