"""Transformers over the pixels of an image, between int8 layers.

Normalizations quantize as they write, residual sums are added by the products, and the image keeps its memory
format: what is left of a transformer are its products and attentions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from errata.deploy.cpu.attention import CPUAttention, image_of, tokens_of
from errata.deploy.cpu.feed_forward import FusedFeedForward
from errata.deploy.cpu.int8 import Int8Layer, is_of_one_part
from errata.deploy.cpu.norms import normed_codes


class FusedTransformerBlock(nn.Module):
    """Stand-in for a `BasicTransformerBlock`, whose layers it shares under the same names."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.norm3, self.ff = block.norm3, block.ff
        self.only_cross_attention: bool = block.only_cross_attention

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Return whether it is a plain one: layer normalizations, and nothing between its three parts."""
        return (
            isinstance(block, BasicTransformerBlock)
            and block.norm_type == "layer_norm"
            and block.pos_embed is None
            and not hasattr(block, "fuser")
            and block._chunk_size is None
        )

    @torch.compiler.disable
    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Map `(B, L, C)` to itself, as the block; time and classes are not looked at, as there."""
        _check_no_options(cross_attention_kwargs)
        context = encoder_hidden_states if self.only_cross_attention else None
        x = _attended(self.attn1, hidden_states, self.norm1, context, attention_mask)
        if self.attn2 is not None:
            x = _attended(self.attn2, x, self.norm2, encoder_hidden_states, encoder_attention_mask)
        if isinstance(self.ff, FusedFeedForward):
            return self.ff.onto(x, self.norm3)
        output: Tensor = self.ff(self.norm3(x))
        return output + x


class FusedTransformer(nn.Module):
    """Stand-in for a `Transformer2DModel`, whose layers it shares under the same names."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = block.norm, block.proj_in, block.proj_out
        self.transformer_blocks = block.transformer_blocks

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Return whether it reads an image through int8 layers of one part."""
        return (
            isinstance(block, Transformer2DModel)
            and block.is_input_continuous
            and isinstance(block.norm, nn.GroupNorm)
            and all(map(is_of_one_part, (block.proj_in, block.proj_out)))
        )

    @torch.compiler.disable
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Map `(B, C, H, W)` to itself, as the model."""
        size = hidden_states.shape[2:]
        (codes,), _ = normed_codes(hidden_states, self.norm, self.proj_in, silu=False)
        x = tokens_of(_projected(self.proj_in, codes))
        own_bias, context_bias = (_bias_of(mask, x) for mask in (attention_mask, encoder_attention_mask))
        for block in self.transformer_blocks:
            x = block(
                x,
                attention_mask=own_bias,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=context_bias,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        (codes,) = self.proj_out.quantized([x])
        output = _projected(self.proj_out, image_of(codes, size), hidden_states)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def _attended(
    attn: Attention, x: Tensor, norm: nn.LayerNorm, context: Tensor | None, mask: Tensor | None
) -> Tensor:
    processor = attn.processor
    if isinstance(processor, CPUAttention) and processor.takes_codes(attn):
        return processor.onto(attn, x, norm, context, mask)
    output: Tensor = attn(norm(x), encoder_hidden_states=context, attention_mask=mask)
    return output + x


def _projected(layer: Int8Layer, codes: Tensor, added: Tensor | None = None) -> Tensor:
    """Return a convolution or a linear layer of the pixels of an image, `(B, C, H, W)`, plus `added`."""
    if layer.geometry.is_conv:
        return layer.product([codes], layer.bias, added)
    rows = None if added is None else tokens_of(added)
    return image_of(layer.product([tokens_of(codes)], layer.bias, rows), codes.shape[2:])


def _bias_of(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return a mask of keys, `(B, K)`, as a bias on scores, `(B, 1, K)`; a bias stays."""
    if mask is None or mask.ndim != 2:
        return mask
    return ((1 - mask.to(x.dtype)) * -10000.0).unsqueeze(1)


def _check_no_options(cross_attention_kwargs: Mapping[str, Any] | None) -> None:
    """Check that attentions are not to be computed in another way.

    Raises:
        NotImplementedError: naming an option that nothing here looks at.
    """
    options = set(cross_attention_kwargs or ()) - {"scale"}  # diffusers ignores it, too
    if options:
        raise NotImplementedError(
            f"cross_attention_kwargs has {', '.join(sorted(options))}, which int8 kernels do not take; "
            "load the artifact with backend='reference'"
        )
