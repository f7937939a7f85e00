"""Weight dilation: weights with room in their range are scaled up, and what feeds them is scaled down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from errata.errors import RecipeError
from errata.large_weights import replace_parameter, stored_weights
from errata.runtime.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Link:
    """Channels that one module produces, linearly in its parameters, and that layers read as they are.

    Attributes:
        producer: name of a normalization, or of a convolution or linear layer; its first `channels` output
            channels are meant.
        channels: how many there are.
        readers: names of all layers that read them, and read nothing else.
    """

    producer: str
    channels: int
    readers: tuple[str, ...]


@torch.no_grad()
def equalize_(unet: nn.Module, scheme: Scheme) -> tuple[str, ...]:
    """Dilate the weights of `unet`, in place, as far as that costs the quantized readers nothing.

    For every `Link`, input channel c of its readers is multiplied by `s_c >= 1` and the producer's channel
    divided by it, so the float network computes what it did. The range of no output channel of a quantized
    reader grows, so its weight step stays while the inputs shrink: the rounding error of the weights reaches
    the output divided by `s_c`. Producers lose nothing: a normalization stays in floating point, and the
    weights of a layer have a scale for each output channel.

    Nothing folds in a resnet: SiLU stands between its GroupNorm and its convolution, and
    `silu(a x) != a silu(x)`. It brought nothing on the embedded model (error of the prediction 7.17 % against
    7.16 %, `benchmarks/cheap_steps.py`), nor did factors as in SmoothQuant (7.15 to 7.16 %).

    Args:
        unet: computes in float32; a copy, which may share its large weights: those that change are replaced.
        scheme: which layers are quantized; links without a quantized reader stay as they are.

    Returns:
        Names of all parameters that were changed, sorted; weights, biases and normalizations.

    Raises:
        RecipeError: the network is not in float32.

    Source: weight dilation of DilateQuant (Liu et al., 2024, section 4.1). Deviations: there s is folded
        into the preceding activation scale; here into the float parameters before it, and only where that
        is exact, so the artifact and its kernels need not know of it.
    """
    stored = stored_weights(unet)
    if any(value.dtype != torch.float32 for name, value in unet.named_parameters() if name not in stored):
        raise RecipeError("equalization needs float32 weights; convert first, pipe.unet.to(torch.float32)")
    quantized = {layer.name for layer in scheme.layers}
    changed: set[str] = set()
    for link in links(unet):
        readers = [name for name in link.readers if name in quantized]
        factors = dilation(unet, link, readers)
        if bool((factors > 1).any()):
            changed.update(rescale_(unet, link, factors))
    return tuple(sorted(changed))


def dilation(unet: nn.Module, link: Link, readers: Sequence[str]) -> Tensor:
    """Return the largest factors `(C,)`, each at least 1, that widen no weight range of these readers.

    For output channel o with the range `r_o = max_c |W_oc|`, channel c may grow by `min_o r_o / |W_oc|`; one
    that holds the largest weight of any output channel is saturated and stays. Several readers share the
    smallest factor. A channel that no reader uses stays too.
    """
    bounds = [torch.full((link.channels,), torch.inf)]
    for name in readers:
        magnitude = _columns(unet, name).abs().cpu()
        used = magnitude.amax(dim=1, keepdim=True)
        bounds.append(torch.where(magnitude > 0, used / magnitude, torch.inf).amin(dim=0))
    factors = torch.stack(bounds).amin(dim=0)
    return torch.where(factors.isfinite(), factors, 1.0).clamp(min=1.0)


@torch.no_grad()
def rescale_(unet: nn.Module, link: Link, factors: Tensor) -> tuple[str, ...]:
    """Multiply the readers' input channels by `factors` `(C,)` and divide what produces them, in `unet`.

    Returns:
        Names of the parameters that were replaced.
    """
    producer, count = unet.get_submodule(link.producer), link.channels
    changed: dict[str, Tensor] = {}
    for name in ("weight", "bias"):
        parameter = getattr(producer, name, None)
        if parameter is not None:
            value = parameter.detach().float().clone()
            value[:count] /= _shaped(factors, value, dim=0)
            changed[f"{link.producer}.{name}"] = value
    for reader in link.readers:
        weight: Any = unet.get_submodule(reader).weight
        changed[f"{reader}.weight"] = weight.detach().float() * _shaped(factors, weight, dim=1)
    for name, value in changed.items():
        replace_parameter(unet, name, value)
    return tuple(changed)


def links(unet: nn.Module) -> tuple[Link, ...]:
    """Return every place where a factor folds exactly, in the order of the modules.

    - `Attention.group_norm`, or `norm1` of a transformer block, to query, key and value of self-attention;
    - `norm2` to the query of cross-attention (keys and values read the text), `norm3` to the feed-forward;
    - `norm` of a spatial transformer to `proj_in`;
    - `to_v` to `to_out.0`: attention mixes positions, never channels;
    - the half of `ff.net.0.proj` that is multiplied by the gate, to `ff.net.2` (GEGLU).
    """
    found: list[Link] = []
    for name, module in unet.named_modules():
        if isinstance(module, Transformer2DModel) and module.is_input_continuous:
            found += _of_norm(unet, f"{name}.norm", (f"{name}.proj_in",))
        elif isinstance(module, BasicTransformerBlock):
            found += _of_block(unet, name, module)
        elif isinstance(module, Attention):
            found += _of_attention(unet, name, module)
    return tuple(found)


def _of_block(unet: nn.Module, name: str, block: Any) -> Iterator[Link]:
    if block.norm_type != "layer_norm" or block.pos_embed is not None:
        return  # adaptive normalizations have no channel-wise parameters of their own
    readers = _self_readers(block.attn1) or ("to_q",)
    yield from _of_norm(unet, f"{name}.norm1", [f"{name}.attn1.{reader}" for reader in readers])
    if (
        block.attn2 is not None and block.attn2.is_cross_attention
    ):  # else what its keys read is up to the call
        yield from _of_norm(unet, f"{name}.norm2", (f"{name}.attn2.to_q",))
    first = block.ff.net[0]
    if isinstance(getattr(first, "proj", None), nn.Linear):
        yield from _of_norm(unet, f"{name}.norm3", (f"{name}.ff.net.0.proj",))
    if type(first).__name__ == "GEGLU":
        half = first.proj.out_features // 2
        yield Link(producer=f"{name}.ff.net.0.proj", channels=half, readers=(f"{name}.ff.net.2",))


def _of_attention(unet: nn.Module, name: str, attention: Any) -> Iterator[Link]:
    if attention.added_kv_proj_dim is not None or attention.fused_projections:
        return  # keys and values of two sources are joined; or other layers than these do the work
    readers = _self_readers(attention)
    if attention.group_norm is not None and readers:
        yield from _of_norm(unet, f"{name}.group_norm", [f"{name}.{reader}" for reader in readers])
    to_v, to_out = attention.to_v, attention.to_out
    if isinstance(to_v, nn.Linear) and to_out is not None and isinstance(to_out[0], nn.Linear):
        yield Link(producer=f"{name}.to_v", channels=to_v.out_features, readers=(f"{name}.to_out.0",))


def _self_readers(attention: Any) -> tuple[str, ...]:
    """Return the layers of a self-attention that read the normalized hidden state; of others, none."""
    return () if attention.is_cross_attention else ("to_q", "to_k", "to_v")


def _of_norm(unet: nn.Module, producer: str, readers: Sequence[str]) -> Iterator[Link]:
    norm: Any = unet.get_submodule(producer)
    is_affine = isinstance(norm, nn.GroupNorm | nn.LayerNorm) and norm.weight is not None
    if is_affine and all(isinstance(unet.get_submodule(r), nn.Linear | nn.Conv2d) for r in readers):
        yield Link(producer=producer, channels=len(norm.weight), readers=tuple(readers))


def _columns(unet: nn.Module, name: str) -> Tensor:
    """Return the largest magnitude of each pair of channels of a weight, `(O, I)`."""
    weight: Any = unet.get_submodule(name).weight
    weight = weight.detach().float()
    return weight.abs().flatten(2).amax(dim=2) if weight.ndim > 2 else weight


def _shaped(factors: Tensor, like: Tensor, *, dim: int) -> Tensor:
    shape = [1] * like.ndim
    shape[dim] = -1
    return factors.to(like.device).reshape(shape)
