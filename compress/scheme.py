"""Which layers are quantized and how: the plan that simulation, artifact and runtime share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from errata.compress.recipe import Quantization
from errata.compress.unet import is_time_embedding, skip_widths
from errata.errors import RecipeError

# Kept at 8 bits in every recipe: the first and last convolution (as in the papers) and the time embedding.
_EIGHT_BIT_LAYERS = ("conv_in", "conv_out")

LayerKind = Literal["conv2d", "linear"]


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """How one convolution or linear layer is quantized.

    `input_widths` are the input channels of its parts: one, or two where the layer reads a concatenation;
    every part has its own activation quantizer and its own weight scales. `activation_bits` is None where the
    input stays in floating point.
    """

    name: str
    kind: LayerKind
    weight_bits: int
    activation_bits: int | None
    input_widths: tuple[int, ...]

    def label(self) -> str:
        """Short text, such as `w4a8` or `w8 (float input)`."""
        bits = self.activation_bits
        return f"w{self.weight_bits} (float input)" if bits is None else f"w{self.weight_bits}a{bits}"


@dataclass(frozen=True, kw_only=True)
class AttentionScheme:
    """Widths of the inputs of one attention's matrix products: query, key, value and softmax output."""

    name: str
    bits: int

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of its quantizers."""
        return tuple(f"{self.name}.{site}" for site in ("query", "key", "value", "probabilities"))


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Everything that is quantized in a UNet; empty for a cache-only recipe."""

    layers: tuple[LayerScheme, ...] = ()
    attentions: tuple[AttentionScheme, ...] = ()

    @classmethod
    def of(cls, unet: UNet2DModel, quantization: Quantization | None) -> Scheme:
        """The scheme that a recipe means for this UNet.

        Raises:
            RecipeError: the UNet has a layer that cannot be quantized.
        """
        if quantization is None:
            return cls()
        widths = skip_widths(unet)
        layers = [
            _layer_scheme(name, module, quantization, widths)
            for name, module in unet.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]
        attentions = [
            AttentionScheme(name=name, bits=quantization.activation_bits)
            for name, module in unet.named_modules()
            if isinstance(module, Attention)
        ]
        return cls(layers=tuple(layers), attentions=tuple(attentions))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; `from_json` reads it back."""
        layers = [{**asdict(layer), "input_widths": list(layer.input_widths)} for layer in self.layers]
        return {"layers": layers, "attentions": [asdict(attention) for attention in self.attentions]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scheme:
        """Inverse of `to_json`."""
        layers = [
            LayerScheme(**{**layer, "input_widths": tuple(layer["input_widths"])})
            for layer in value["layers"]
        ]
        return cls(
            layers=tuple(layers), attentions=tuple(AttentionScheme(**item) for item in value["attentions"])
        )


def _layer_scheme(
    name: str, module: nn.Conv2d | nn.Linear, quantization: Quantization, widths: Mapping[str, int]
) -> LayerScheme:
    is_conv = isinstance(module, nn.Conv2d)
    total = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        raise RecipeError(
            f"layer {name!r} has groups={module.groups}, padding_mode={module.padding_mode!r}; "
            "supported are dense convolutions with zero padding"
        )
    main = widths.get(name, total)
    time = is_time_embedding(name)
    return LayerScheme(
        name=name,
        kind="conv2d" if is_conv else "linear",
        weight_bits=8 if time or name in _EIGHT_BIT_LAYERS else quantization.weight_bits,
        activation_bits=None if time else quantization.activation_bits,
        input_widths=(total,) if main == total else (main, total - main),
    )
