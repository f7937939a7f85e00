"""Attention between int8 projections: only their inputs are quantized, above the precision of the scheme."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from errata.deploy.cpu import attention_kernel
from errata.deploy.cpu.int8 import Int8Layer, is_of_one_part
from errata.deploy.cpu.norms import layer_normed_codes, normed_codes_of_each
from errata.runtime.attention import QuantizedAttention

# Width of a head from which two products in bfloat16 are faster than the fused kernel in float32.
_WIDE_HEAD = 128


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for it; emulated, it would be slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


class CPUAttention(QuantizedAttention):
    """Query, key, value and the softmax output stay in floating point.

    One quantization serves all projections that read the same input. Where the CPU multiplies bfloat16, the
    products round to 2^-9 of a value; the 8-bit grids of the scheme round to 2^-9 of a range. Errata's own
    kernel computes an attention block by block, and hands its codes to the output projection.
    """

    def __init__(self) -> None:
        super().__init__(query=_as_it_is, key=_as_it_is, value=_as_it_is, probabilities=None)
        self._has_bfloat16 = multiplies_bfloat16()
        kinds = attention_kernel.attention_kinds()
        self._has_kernel, self._kind = bool(kinds), next(iter(kinds), None)

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
        if encoder_hidden_states is None and attention_mask is None and _is_of_pixels(attn):
            return self._over_pixels(attn, hidden_states)
        if not (self._serves(attn) and _is_of_tokens(attn, hidden_states)):
            return super().forward(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        query, key, value = self._quantized_inputs(attn, hidden_states, encoder_hidden_states)
        residual = hidden_states if attn.residual_connection else None
        return _rescaled(attn, self._attended(attn, query, key, value, attention_mask, residual))

    def takes_codes(self, attn: Attention) -> bool:
        """Return whether `onto` serves an attention: its projections are int8 layers of one part."""
        return (
            self._serves(attn)
            and _reads_as_it_is(attn)
            and not _normalizes_inside(attn)
            and not attn.residual_connection
            and attn.rescale_output_factor == 1
            and all(map(is_of_one_part, (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])))
        )

    @torch.compiler.disable
    def onto(
        self, attn: Attention, x: Tensor, norm: nn.LayerNorm, context: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return `x`, `(B, L, C)`, plus the attention of `norm(x)` to itself or to the context."""
        dtype = self._dtype(attn)
        own = (attn.to_q,) if context is not None else (attn.to_q, attn.to_k, attn.to_v)
        codes = layer_normed_codes(x, norm, [layer.quantizers()[0] for layer in own])
        query, *others = _products(own, codes, dtype=dtype)
        key, value = others if context is None else _projected(context, attn.to_k, attn.to_v, dtype=dtype)
        return self._attended(attn, query, key, value, mask, x)

    def _over_pixels(self, attn: Attention, hidden_states: Tensor) -> Tensor:
        """Attend over an image `(B, C, H, W)` to itself, normalized by groups."""
        layers = (attn.to_q, attn.to_k, attn.to_v)
        codes = normed_codes_of_each(hidden_states, attn.group_norm, layers)
        query, key, value = _products(layers, map(tokens_of, codes), dtype=self._dtype(attn))
        residual = tokens_of(hidden_states) if attn.residual_connection else None
        output = self._attended(attn, query, key, value, None, residual)
        return _rescaled(attn, image_of(output, hidden_states.shape[2:]))

    def _serves(self, attn: Attention) -> bool:
        """Return whether the kernel has room for heads of that width."""
        return self._has_kernel and attn.inner_dim // attn.heads <= attention_kernel.WIDEST_HEAD

    def _dtype(self, attn: Attention) -> torch.dtype:
        """Return what projections write: rounded here, what is multiplied in bfloat16 is written once."""
        if self._serves(attn) and self._kind is not None:
            return self._kind.dtype
        is_wide = self._has_bfloat16 and attn.inner_dim // attn.heads >= _WIDE_HEAD
        return torch.bfloat16 if is_wide else torch.float32

    def _quantized_inputs(
        self, attn: Attention, hidden_states: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if _normalizes_inside(attn):
            return super()._quantized_inputs(attn, hidden_states, context)
        dtype = self._dtype(attn)
        if context is None:
            query, key, value = _projected(hidden_states, attn.to_q, attn.to_k, attn.to_v, dtype=dtype)
        else:
            (query,) = _projected(hidden_states, attn.to_q, dtype=dtype)
            key, value = _projected(context, attn.to_k, attn.to_v, dtype=dtype)
        return query, key, value

    def _attended(
        self,
        attn: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """Return the output projection of an attention, plus the residual; free to be changed.

        `mask` is as the processor gets it.
        """
        layer = attn.to_out[0]
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, key.shape[1], key.shape[0])
        if not (self._serves(attn) and is_of_one_part(layer)):
            return _plus(layer, self._attend(attn, query, key, value, mask), residual)
        (quantizer,) = layer.quantizers()
        codes = self._computed(attn, query, key, value, mask, codes=quantizer)
        return layer.product([codes], layer.bias, residual)

    def _computed(
        self,
        attn: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        codes: tuple[float, int] | None = None,
    ) -> Tensor:
        """Return what the kernel makes of them, numbers or codes."""
        return attention_kernel.attention(
            query, key, value, heads=attn.heads, scale=attn.scale, mask=mask, codes=codes, kind=self._kind
        )

    def _attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        if self._serves(attn):
            return self._computed(attn, query, key, value, mask)
        if mask is not None or self._dtype(attn) is torch.float32:
            return super()._attend(attn, query.float(), key.float(), value.float(), mask)
        query, key, value = (
            attn.head_to_batch_dim(x) for x in (query.bfloat16(), key.bfloat16(), value.bfloat16())
        )
        scores = torch.baddbmm(query.new_empty(1), query, key.transpose(1, 2), beta=0, alpha=attn.scale)
        output = torch.bmm(scores.softmax(dim=-1), value)
        return attn.batch_to_head_dim(output).float()


def tokens_of(image: Tensor) -> Tensor:
    """Return `(B, C, H, W)` as `(B, H x W, C)`: of a channels_last tensor the same memory."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def image_of(tokens: Tensor, size: torch.Size) -> Tensor:
    """Return `(B, H x W, C)` as `(B, C, H, W)`, in the same memory."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)


def _rescaled(attn: Attention, output: Tensor) -> Tensor:
    """Return an output that may be changed, rescaled as the attention says."""
    return output if attn.rescale_output_factor == 1 else output.div_(attn.rescale_output_factor)


def _is_of_tokens(attn: Attention, hidden_states: Tensor) -> bool:
    """Return whether it attends over a sequence as it is."""
    return hidden_states.ndim == 3 and _reads_as_it_is(attn)


def _reads_as_it_is(attn: Attention) -> bool:
    """Return whether its projections read what it gets, and nothing else."""
    return attn.added_kv_proj_dim is None and attn.group_norm is None and attn.spatial_norm is None


def _normalizes_inside(attn: Attention) -> bool:
    """Return whether it normalizes the context, queries or keys."""
    return bool(attn.norm_cross) or attn.norm_q is not None or attn.norm_k is not None


def _is_of_pixels(attn: Attention) -> bool:
    """Return whether it attends over an image, normalized by groups, with int8 projections."""
    return (
        isinstance(attn.group_norm, nn.GroupNorm)
        and attn.spatial_norm is None
        and attn.norm_q is None
        and attn.norm_k is None
        and all(map(is_of_one_part, (attn.to_q, attn.to_k, attn.to_v)))
    )


def _projected(x: Tensor, *layers: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """Return `x` through each of the layers, quantized once where they quantize alike; then in that type."""
    first = layers[0]
    if not isinstance(first, Int8Layer) or not _share_an_input(*layers):
        return [layer(x) for layer in layers]
    codes = first.quantized([x])
    return [layer.product(codes, layer.bias, dtype=dtype) for layer in layers if isinstance(layer, Int8Layer)]


def _products(layers: Iterable[Int8Layer], codes: Iterable[Tensor], *, dtype: torch.dtype) -> list[Tensor]:
    """Return each layer, of one part, on codes of its own."""
    return [layer.product([read], layer.bias, dtype=dtype) for layer, read in zip(layers, codes, strict=True)]


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
        is_of_one_part(layer) and layer.tables[0].equals(first.tables[0]) for layer in layers
    )


def _as_it_is(x: Tensor) -> Tensor:
    return x
