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
        """Attends over `hidden_states` `(B, C, H, W)` or `(B, L, C)`; same shape out.

        Raises:
            NotImplementedError: an attention mask is given.
        """
        if attention_mask is not None:
            raise NotImplementedError("attention masks are not supported by the quantized attention")
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
        query = attn.head_to_batch_dim(self.query(attn.to_q(hidden_states)))
        key = attn.head_to_batch_dim(self.key(attn.to_k(context)))
        value = attn.head_to_batch_dim(self.value(attn.to_v(context)))
        output = attn.batch_to_head_dim(self._attend(query, key, value, attn))
        output = attn.to_out[1](attn.to_out[0](output))
        if len(shape) == 4:
            output = output.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        result: Tensor = output / attn.rescale_output_factor
        return result

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, attn: Attention) -> Tensor:
        if self.probabilities is None:
            # The fused kernel serves (batch, heads, length, width) only.
            query, key, value = (x.unflatten(0, (-1, attn.heads)) for x in (query, key, value))
            return functional.scaled_dot_product_attention(query, key, value, scale=attn.scale).flatten(0, 1)
        scores = torch.bmm(query * attn.scale, key.transpose(1, 2))
        return torch.bmm(self.probabilities(scores.softmax(dim=-1)), value)


def set_attention(unet: nn.Module, name: str, processor: QuantizedAttention) -> None:
    """Gives the attention of that name another processor, in `unet` itself."""
    attention = unet.get_submodule(name)
    assert isinstance(attention, Attention)  # the scheme names attentions only
    attention.set_processor(processor)
