"""The copy of a network that is run to see what its quantizers will read, and what watches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from errata.compress.quantize.step_sketch import StepSketch, spread_places
from errata.large_weights import sharing_copy
from errata.runtime.attention import QuantizedAttention, set_attention
from errata.runtime.scheme import AttentionScheme, LayerScheme, Scheme, layer_sites

# Smaller networks are too small to gain from bfloat16: their time is that of calls.
_SMALLEST_IN_BFLOAT16 = 1_000_000
# Of a time embedding: high frequencies times large timesteps need all bits of float32.
_FLOAT32_MODULES = ("time_proj",)
# Queries of each head whose attention probabilities are looked at.
QUERIES = 512
# Probabilities in memory at once.
PROBABILITIES = 2**22


def observing_dtype(unet: nn.Module) -> torch.dtype:
    """Return the type to observe a network in: bfloat16 where the device multiplies it fast, else float32.

    Its rounding, 0.4 % of a value, moves no range by as much as the next candidate is away.
    """
    if sum(parameter.numel() for parameter in unet.parameters()) < _SMALLEST_IN_BFLOAT16:
        return torch.float32
    is_fast = has_fast_bfloat16(next(unet.parameters()).device)
    return torch.bfloat16 if is_fast else torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported())


def observed_copy(unet: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy that computes in another type, in evaluation mode; it shares the large weights."""
    return sharing_copy(unet, dtype, float32_modules=_FLOAT32_MODULES, channels_last=True)


@contextmanager
def watching(unet: nn.Module, scheme: Scheme, sketch: StepSketch) -> Iterator[None]:
    """Show the sketch what every site reads, for the length of a `with`."""
    handles = [
        unet.get_submodule(layer.name).register_forward_pre_hook(_layer_hook(layer, sketch))
        for layer in scheme.layers
        if layer.activation_bits is not None
    ]
    for attention in scheme.attentions:
        set_attention(unet, attention.name, ObservedAttention(attention, sketch))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_hook(layer: LayerScheme, sketch: StepSketch) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dim = 1 if layer.kind == "conv2d" else -1
        parts = inputs[0].split(list(layer.input_widths), dim=dim)
        for site, part in zip(layer_sites(layer), parts, strict=True):
            sketch.add(site.name, part)

    return hook


class ObservedAttention(QuantizedAttention):
    """Attention in floating point that shows a sketch its query, key, value and probabilities.

    The output comes from the fused kernel. Of the probabilities, those of `QUERIES` queries a head at most
    are computed, `PROBABILITIES` at a time: the product of rows, heads and squared tokens is never in memory.
    """

    def __init__(self, attention: AttentionScheme, sketch: StepSketch) -> None:
        query, key, value, self._name = attention.sites
        super().__init__(
            query=_recorder(query, sketch),
            key=_recorder(key, sketch),
            value=_recorder(value, sketch),
            probabilities=None,
        )
        self._sketch = sketch

    def _attend(
        self, attn: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        self._observe(attn, query, key, mask)
        return super()._attend(attn, query, key, value, mask)

    def _observe(self, attn: Attention, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        """Show the sketch the probabilities, slice by slice."""
        length = query.shape[1]
        if length > QUERIES:
            chosen = spread_places(length, QUERIES).sort().values.to(query.device)
            query = query[:, chosen]
            mask = mask if mask is None or mask.shape[1] == 1 else mask[:, chosen]
        query, key = attn.head_to_batch_dim(query), attn.head_to_batch_dim(key)
        heads, queries = query.shape[:2]
        tall = max(1, min(queries, PROBABILITIES // key.shape[1]))
        deep = max(1, PROBABILITIES // (tall * key.shape[1]))
        for first in range(0, heads, deep):
            rows = slice(first, first + deep)
            for start in range(0, queries, tall):
                columns = slice(start, start + tall)
                part = query[rows, columns]
                bias = None if mask is None else mask[rows] if mask.shape[1] == 1 else mask[rows, columns]
                seen = part.shape[0] * part.shape[1] / (heads * queries)
                scores = attn.get_attention_scores(part, key[rows], bias)
                self._sketch.add(self._name, scores, part=seen)


def _recorder(site: str, sketch: StepSketch) -> Callable[[Tensor], Tensor]:
    def record(x: Tensor) -> Tensor:
        sketch.add(site, x)
        return x

    return record
