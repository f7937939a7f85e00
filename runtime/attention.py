"""Attention whose matrix products read quantized inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

TensorMap = Callable[[Tensor], Tensor]


class QuantizedAttention(nn.Module):
    """Attention processor for diffusers: quantizes query, key, value and the softmax output.

    Each of the four callables maps a tensor to its quantized (or merely observed) self; the arithmetic
    between them is floating point. Where the probabilities are quantized the products are computed one by
    one; with `probabilities=None` they stay in floating point, and one fused kernel computes everything.

    Source: timestep-wise quantization as in CacheQuant and EDA-DM (softmax output 8-bit, unsigned from 0).
    """

    def __init__(
        self, *, query: TensorMap, key: TensorMap, value: TensorMap, probabilities: TensorMap | None
    ) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.value = value
        self.probabilities = probabilities

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """See `forward`; spelled out because diffusers reads the names of the arguments off `__call__`."""
        result: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return result

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend over `hidden_states` `(B, C, H, W)` or `(B, L, C)`; same shape out.

        `encoder_hidden_states` is `(B, K, D)`; None means that they attend to themselves. `attention_mask` is
        a bias on the scores, `(B, 1, K)`.

        Raises:
            NotImplementedError: the attention adds projected keys and values.

        Source: `AttnProcessor2_0` of diffusers 0.42, whose order of operations this keeps.
        """
        if attn.added_kv_proj_dim is not None:
            raise NotImplementedError("attention with added_kv_proj_dim is not supported when quantized")
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = self._quantized_inputs(attn, hidden_states, encoder_hidden_states)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[1], key.shape[0])
        output = self._attend(attn, query, key, value, attention_mask)
        output = attn.to_out[1](attn.to_out[0](output))
        if len(shape) == 4:
            output = output.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        result: Tensor = output / attn.rescale_output_factor
        return result

    def _quantized_inputs(
        self, attn: Attention, hidden_states: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query `(B, L, heads x width)`, key and value `(B, K, heads x width)`."""
        if context is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query = _by_head(attn.to_q(hidden_states), attn.norm_q, attn.heads)
        key = _by_head(attn.to_k(context), attn.norm_k, attn.heads)
        return self.query(query), self.key(key), self.value(attn.to_v(context))

    def _attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Return `(B, L, heads x width)`; `mask` is `(B x heads, 1 or L, K)`."""
        if self.probabilities is None:
            # The fused kernel serves (batch, heads, length, width) only.
            query, key, value = (
                x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
            )
            mask = None if mask is None else mask.unflatten(0, (-1, attn.heads))
            output = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=attn.scale
            )
            return output.transpose(1, 2).flatten(2)
        query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))
        probabilities = self.probabilities(attn.get_attention_scores(query, key, mask))
        return attn.batch_to_head_dim(torch.bmm(probabilities, value))


def _by_head(x: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
    """Return `x`, `(B, L, heads x width)`, with each head normalised where the attention does so."""
    return x if norm is None else norm(x.unflatten(-1, (heads, -1))).flatten(-2)


def set_attention(unet: nn.Module, name: str, processor: QuantizedAttention) -> None:
    """Give the attention of that name another processor, in `unet` itself."""
    attention = unet.get_submodule(name)
    assert isinstance(attention, Attention)  # the scheme names attentions only
    attention.set_processor(processor)
