"""The blocks of a UNet that learned rounding reconstructs one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from errata.runtime.scheme import AttentionScheme, LayerScheme, Scheme, layer_sites

# Modules that are reconstructed as a whole; where one holds another, the outer one counts. By name: the
# arithmetic here needs nothing of diffusers.
_BLOCK_TYPES = frozenset(
    {"ResnetBlock2D", "ResnetBlockCondNorm2D", "BasicTransformerBlock", "KAttentionBlock", "Attention"}
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A module whose quantized layers and attentions are learned together.

    Attributes:
        name: of the module in the UNet.
        layers: quantized layers in it; the module itself if it is a layer.
        attentions: quantized attentions in it; the module itself if it is one.
    """

    name: str
    layers: tuple[LayerScheme, ...]
    attentions: tuple[AttentionScheme, ...]

    def inner(self, name: str) -> str:
        """Return the name of something in the block as seen from it; empty for the block itself."""
        return name.removeprefix(self.name).removeprefix(".")

    def scales(self) -> dict[str, str]:
        """Name of every activation quantizer in the table, and of its `scale` as seen from the block."""
        names: dict[str, str] = {}
        for layer in self.layers:
            for part, site in enumerate(layer_sites(layer)):
                names[site.name] = _join(self.inner(layer.name), f"quantizers.{part}.scale")
        for attention in self.attentions:
            for site_name in attention.sites:
                site_kind = site_name.rpartition(".")[2]
                names[site_name] = _join(self.inner(attention.name), f"processor.{site_kind}.scale")
        return names

    def weights(self) -> dict[str, str]:
        """Name of every quantized layer, and of its `weight` as seen from the block."""
        return {layer.name: _join(self.inner(layer.name), "weight") for layer in self.layers}


def blocks_of(unet: nn.Module, scheme: Scheme) -> tuple[Block, ...]:
    """Return the blocks of a UNet, in the order of its modules: every quantized layer is in exactly one.

    A block without a quantized layer has nothing to round, and is left out.
    """
    owners = _owners(unet)
    layers: dict[str, list[LayerScheme]] = {}
    for layer in scheme.layers:
        layers.setdefault(owners.get(layer.name, layer.name), []).append(layer)
    attentions: dict[str, list[AttentionScheme]] = {}
    for attention in scheme.attentions:
        attentions.setdefault(owners.get(attention.name, attention.name), []).append(attention)
    return tuple(
        Block(name=name, layers=tuple(members), attentions=tuple(attentions.get(name, ())))
        for name, members in layers.items()
    )


def _owners(unet: nn.Module) -> Mapping[str, str]:
    """Return the outermost block that each module is in, by name."""
    owners: dict[str, str] = {}
    for name, module in unet.named_modules():
        parent = name.rpartition(".")[0]
        if parent in owners:
            owners[name] = owners[parent]
        elif type(module).__name__ in _BLOCK_TYPES:
            owners[name] = name
    return owners


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
