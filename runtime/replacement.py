"""Quantized layers take the places of a network's float ones."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from errata.runtime.attention import QuantizedAttention, set_attention
from errata.runtime.layers import float_layer, replace_module
from errata.runtime.scheme import AttentionScheme, LayerScheme, Scheme


def replace_layers(
    unet: nn.Module,
    scheme: Scheme,
    *,
    layer: Callable[[LayerScheme, nn.Conv2d | nn.Linear], nn.Module],
    attention: Callable[[AttentionScheme], QuantizedAttention],
) -> None:
    """Put a module into `unet`, in place, for every layer of the scheme, and a processor for every attention.

    Args:
        unet: the float network, possibly on the meta device.
        scheme: of its layers.
        layer: makes what takes the place of a float layer.
        attention: makes the processor of an attention.
    """
    for described in scheme.layers:
        replace_module(unet, described.name, layer(described, float_layer(unet, described.name)))
    for products in scheme.attentions:
        set_attention(unet, products.name, attention(products))
