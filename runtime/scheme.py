"""Which layers are quantized and how: the plan that simulation, artifact and runtime share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from errata.errors import RecipeError
from errata.runtime.outline import kind_of
from errata.runtime.recipes.quantization import Quantization, matches
from errata.runtime.recipes.recipe import CacheQuant, Recipe
from errata.runtime.structure import (
    embedding_layers,
    feature_channels,
    feature_readers,
    output_channels,
    skip_widths,
)

if TYPE_CHECKING:
    from errata.runtime.structure import Network

# Kept at 8 bits in every recipe: the first and last convolution (as in the papers) and the time embedding.
_EIGHT_BIT_LAYERS = ("conv_in", "conv_out")
# Names of the two tensors of an output map in the table of a scheme.
OUTPUT_MAP = ("output.matrix", "output.bias")

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
        """Return a short text, such as `w4a8` or `w8 (float input)`."""
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


@dataclass(frozen=True)
class Site:
    """One activation quantizer: where it sits and what it may assume."""

    name: str
    bits: int
    from_zero: bool = False


@dataclass(frozen=True, kw_only=True)
class CorrectedLayer:
    """A layer that reads the cached feature and whose output is corrected there, channel by channel."""

    name: str
    channels: int


@dataclass(frozen=True, kw_only=True)
class CacheCorrection:
    """What is corrected at cached steps: the feature itself, and the output of layers that read it.

    Its numbers are in the table: `cache.gain` and `cache.shift`, `(T, C)`, and for each layer
    `<layer>.output_gain` and `<layer>.output_shift`, `(T, O)`; float32.

    Source: decoupled error correction of CacheQuant (Liu et al., CVPR 2025), section 3.3.
    """

    feature_channels: int
    layers: tuple[CorrectedLayer, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CalibratedOutput:
    """The prediction of every call goes through an affine map of its channels.

    Its numbers are in the table: `output.matrix`, `(T, C, C)`, and `output.bias`, `(T, C)`; float32. Where
    the map was measured not to help, they are those of the identity.
    """

    channels: int


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Everything that is quantized or corrected in a UNet; empty for a plain cache."""

    layers: tuple[LayerScheme, ...] = ()
    attentions: tuple[AttentionScheme, ...] = ()
    correction: CacheCorrection | None = None
    output: CalibratedOutput | None = None

    @classmethod
    def of(cls, unet: Network, recipe: Recipe, *, branch: int) -> Scheme:
        """Return the scheme that a recipe means for this UNet, whose cached steps recompute `branch` resnets.

        Raises:
            RecipeError: the UNet has a layer that cannot be quantized; or a pattern of the recipe matches
                nothing.
        """
        layers: tuple[LayerScheme, ...] = ()
        attentions: tuple[AttentionScheme, ...] = ()
        if recipe.quantization is not None:
            layers, attentions = _quantized(unet, recipe.quantization)
        correction = None
        if isinstance(recipe.cache, CacheQuant) and recipe.cache.correction:
            correction = _correction(unet, recipe.quantization, layers, branch)
        output = None
        if layers and recipe.calibrated_output:  # without quantization, full calls are right already
            output = CalibratedOutput(channels=output_channels(unet))
        return cls(layers=layers, attentions=attentions, correction=correction, output=output)

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value; `from_json` reads it back. Without a calibrated output it has no key."""
        layers = [{**asdict(layer), "input_widths": list(layer.input_widths)} for layer in self.layers]
        value = {
            "layers": layers,
            "attentions": [asdict(attention) for attention in self.attentions],
            "correction": None if self.correction is None else asdict(self.correction),
        }
        return value if self.output is None else {**value, "output": asdict(self.output)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Scheme:
        """Read back what `to_json` wrote."""
        layers = [
            LayerScheme(**{**layer, "input_widths": tuple(layer["input_widths"])})
            for layer in value["layers"]
        ]
        correction = value["correction"]
        if correction is not None:
            corrected = tuple(CorrectedLayer(**layer) for layer in correction["layers"])
            correction = CacheCorrection(**{**correction, "layers": corrected})
        return cls(
            layers=tuple(layers),
            attentions=tuple(AttentionScheme(**item) for item in value["attentions"]),
            correction=correction,
            output=CalibratedOutput(**value["output"]) if "output" in value else None,
        )


def layer_sites(layer: LayerScheme) -> tuple[Site, ...]:
    """Return the sites at the input of a layer, one for each part; none where the input stays float."""
    if layer.activation_bits is None:
        return ()
    return tuple(
        Site(f"{layer.name}.input.{part}", layer.activation_bits) for part in range(len(layer.input_widths))
    )


def sites_of(scheme: Scheme) -> tuple[Site, ...]:
    """Return all activation quantizers of a scheme, layers first."""
    layers = [site for layer in scheme.layers for site in layer_sites(layer)]
    attentions = [
        Site(name, attention.bits, from_zero=name.endswith(".probabilities"))
        for attention in scheme.attentions
        for name in attention.sites
    ]
    return (*layers, *attentions)


def _quantized(
    unet: Network, quantization: Quantization
) -> tuple[tuple[LayerScheme, ...], tuple[AttentionScheme, ...]]:
    widths, embeddings = skip_widths(unet), embedding_layers(unet)
    modules = {
        name: module
        for name, module in unet.named_modules()
        if kind_of(module) in ("conv2d", "linear", "attention")
    }
    for pattern in quantization.patterns:
        if not any(matches(pattern, name) for name in modules):
            raise RecipeError(
                f"pattern {pattern!r} of the recipe matches no layer of this {type(unet).__name__}; "
                f"its layers are called {', '.join(list(modules)[:3])}, …"
            )
    converted = {name: module for name, module in modules.items() if quantization.converts(name)}
    layers = tuple(
        _layer_scheme(name, module, quantization, widths, is_embedding=name in embeddings)
        for name, module in converted.items()
        if kind_of(module) != "attention"
    )
    attentions = tuple(
        AttentionScheme(name=name, bits=quantization.activation_bits)
        for name, module in converted.items()
        if kind_of(module) == "attention"
    )
    if not layers:
        raise RecipeError(
            f"modules_to_not_convert={list(quantization.modules_to_not_convert)} leaves nothing to quantize; "
            "leave a layer to convert, or choose a recipe without a quantizer"
        )
    return layers, attentions


def _correction(
    unet: Network, quantization: Quantization | None, layers: tuple[LayerScheme, ...], branch: int
) -> CacheCorrection:
    """Return what is corrected; readers' outputs only with weights rounded to nearest, as in the source."""
    readers: tuple[CorrectedLayer, ...] = ()
    if quantization is not None and quantization.rounding is None:
        quantized = {layer.name for layer in layers}
        readers = tuple(
            CorrectedLayer(name=name, channels=_output_width(unet, name))
            for name in feature_readers(unet, branch)
            if name in quantized
        )
    return CacheCorrection(feature_channels=feature_channels(unet, branch), layers=readers)


def _output_width(unet: Network, layer: str) -> int:
    module: Any = unet.get_submodule(layer)
    return int(module.weight.shape[0])


def _layer_scheme(
    name: str,
    module: Any,
    quantization: Quantization,
    widths: Mapping[str, int],
    *,
    is_embedding: bool,
) -> LayerScheme:
    is_conv = kind_of(module) == "conv2d"
    total = module.in_channels if is_conv else module.in_features
    if is_conv and (module.groups != 1 or module.padding_mode != "zeros"):
        raise RecipeError(
            f"layer {name!r} has groups={module.groups}, padding_mode={module.padding_mode!r}; "
            "supported are dense convolutions with zero padding"
        )
    main = widths.get(name, total)
    default = 8 if is_embedding or name in _EIGHT_BIT_LAYERS else quantization.weight_bits
    return LayerScheme(
        name=name,
        kind="conv2d" if is_conv else "linear",
        weight_bits=quantization.bits_of(name, default),
        activation_bits=None if is_embedding else quantization.activation_bits,
        input_widths=(total,) if main == total else (main, total - main),
    )
