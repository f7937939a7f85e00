"""What a recipe would make of a pipeline: every layer, the cache, and the bytes that result."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from errata.compress.jobs.preparation import Preparation
from errata.runtime.layers import float_layer
from errata.runtime.recipes.caching import DeepCache
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.schedule import CacheSchedule
from errata.runtime.scheme import LayerScheme, Scheme, sites_of
from errata.runtime.weight_formats import weight_format

# The types of an artifact's tensors, as docs/artifact-format.md has them.
_FLOAT_BYTES, _ZERO_POINT_BYTES = 4, 1


@dataclass(frozen=True, kw_only=True)
class LayerDryRun:
    """One layer or attention.

    Attributes:
        name: of the module.
        kind: `conv2d`, `linear` or `attention`.
        scheme: short text, such as `w4a8`, `w8 (float input)`, `a8 matmuls` or `float`.
        parts: input channels of each part; empty for an attention.
        shape: of the weight; empty for an attention.
        weight_bytes: of its weight: codes and their scales, or floats where it is not quantized.
    """

    name: str
    kind: str
    scheme: str
    parts: tuple[int, ...]
    shape: tuple[int, ...]
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What `compress` would do, without its work.

    Attributes:
        recipe: the choices.
        layers: every convolution, linear layer and quantized attention, in the network's order.
        branch: resnets that a cached step recomputes; 0 without a cache.
        num_steps: denoiser calls of the recorded sampler.
        schedule: None where it is searched.
        sizes: bytes of the exported UNet's tensors by what they are.
        float32_bytes: of the float UNet's parameters in float32.
        calls_per_step: denoiser calls of each sampler step.
    """

    recipe: Recipe
    layers: tuple[LayerDryRun, ...]
    branch: int
    num_steps: int
    schedule: CacheSchedule | None
    sizes: dict[str, int]
    float32_bytes: int
    calls_per_step: int = 1

    @classmethod
    def of(
        cls, pipe: DiffusionPipeline, recipe: Recipe, *, num_steps: int, calls_per_step: int = 1
    ) -> Preview:
        """Return the preview; looks at the network and the recipe, reads no weights and writes nothing.

        `num_steps` and `calls_per_step` are those of the calibration set.

        Raises:
            RecipeError: as `compress`.
        """
        preparation = Preparation.of(pipe, recipe)
        unet, scheme = pipe.unet, preparation.scheme
        return cls(
            recipe=recipe,
            layers=_layers(unet, scheme),
            branch=preparation.branch,
            num_steps=num_steps,
            schedule=_schedule(preparation, num_steps, calls_per_step),
            sizes=tensor_bytes(unet, scheme, num_steps=num_steps),
            float32_bytes=_FLOAT_BYTES * sum(value.numel() for value in unet.state_dict().values()),
            calls_per_step=calls_per_step,
        )

    @property
    def total_bytes(self) -> int:
        """Of all tensors of the exported UNet."""
        return sum(self.sizes.values())

    def cache_text(self) -> str:
        """Return the schedule in a line: F is a full denoiser call, c a cached one."""
        if self.recipe.cache is None:
            return "none"
        tail = f" ({self.branch} of the up path's resnets recomputed)"
        if self.schedule is None:
            steps = self.num_steps // self.calls_per_step
            return f"searched on the trajectories: {self._count} of {steps} steps full{tail}"
        return "".join(self.schedule.kind(step)[0] for step in range(self.num_steps)).replace("f", "F") + tail

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value."""
        return {
            "recipe": self.recipe.to_json(),
            "name": self.recipe.name,
            "layers": [asdict(layer) for layer in self.layers],
            "branch": self.branch,
            "num_steps": self.num_steps,
            "schedule": "searched" if self.schedule is None else list(self.schedule.full_steps),
            "bytes": {**self.sizes, "total": self.total_bytes},
            "float32_bytes": self.float32_bytes,
        }

    @property
    def _count(self) -> int:
        """⌈T/N⌉ full sampler steps, searched or not."""
        cache = self.recipe.cache
        assert cache is not None  # asked of searched schedules only
        assert cache.interval is not None
        return -(-self.num_steps // (self.calls_per_step * cache.interval))


def tensor_bytes(unet: nn.Module, scheme: Scheme, *, num_steps: int) -> dict[str, int]:
    """Return the bytes of the exported UNet's tensors, by what they are, without the file's header.

    `unet` is the float network, of any type; next to quantized layers all floats are float32.
    """
    quantized = {layer.name: layer for layer in scheme.layers}
    sizes = Counter[str](
        {
            "codes": sum(_code_bytes(unet, layer) for layer in scheme.layers),
            "weight scales": sum(_scale_bytes(unet, layer) for layer in scheme.layers),
            "activation scales": len(sites_of(scheme)) * num_steps * (_FLOAT_BYTES + _ZERO_POINT_BYTES),
            "cache correction": _correction_bytes(scheme, num_steps=num_steps),
            "calibrated output": _output_bytes(scheme, num_steps=num_steps),
        }
    )
    for name, value in unet.state_dict().items():
        layer, _, parameter = name.rpartition(".")
        width = value.element_size()
        if scheme.layers and value.is_floating_point():
            width = _FLOAT_BYTES
        if layer not in quantized:
            sizes["float parameters"] += width * value.numel()
        elif parameter == "bias":
            sizes["biases"] += width * value.numel()
    return {name: size for name, size in sizes.items() if size}


def _code_bytes(unet: nn.Module, layer: LayerScheme) -> int:
    """Return the bytes of a layer's codes as its weight format packs them."""
    shape = float_layer(unet, layer.name).weight.shape
    return weight_format(layer.weight_bits).stored_bytes(shape)


def _scale_bytes(unet: nn.Module, layer: LayerScheme) -> int:
    channels = float_layer(unet, layer.name).weight.shape[0]
    return _FLOAT_BYTES * len(layer.input_widths) * channels


def _correction_bytes(scheme: Scheme, *, num_steps: int) -> int:
    """Return the bytes of a gain and a shift for each channel and step."""
    if scheme.correction is None:
        return 0
    channels = scheme.correction.feature_channels + sum(layer.channels for layer in scheme.correction.layers)
    return 2 * _FLOAT_BYTES * num_steps * channels


def _output_bytes(scheme: Scheme, *, num_steps: int) -> int:
    """Return the bytes of a matrix and a bias for each step."""
    channels = 0 if scheme.output is None else scheme.output.channels
    return _FLOAT_BYTES * num_steps * channels * (channels + 1)


def _schedule(preparation: Preparation, num_steps: int, calls_per_step: int) -> CacheSchedule | None:
    cache, branch = preparation.recipe.cache, preparation.branch
    if cache is None:
        return CacheSchedule.uncached(num_steps, calls_per_step=calls_per_step)
    if isinstance(cache, DeepCache):
        return cache.schedule(num_steps, branch=branch, calls_per_step=calls_per_step)
    if preparation.is_searched:
        return None
    return CacheSchedule.uniform(
        num_steps, interval=cache.interval, branch=branch, calls_per_step=calls_per_step
    )


def _layers(unet: nn.Module, scheme: Scheme) -> tuple[LayerDryRun, ...]:
    layers = {layer.name: layer for layer in scheme.layers}
    attentions = {attention.name: attention for attention in scheme.attentions}
    found = []
    for name, module in unet.named_modules():
        if name in attentions:
            label = f"a{attentions[name].bits} matmuls"
            found.append(
                LayerDryRun(name=name, kind="attention", scheme=label, parts=(), shape=(), weight_bytes=0)
            )
        elif isinstance(module, nn.Conv2d | nn.Linear):
            found.append(_layer(name, module, layers.get(name), unet, is_float32=bool(layers)))
    return tuple(found)


def _layer(
    name: str, module: nn.Conv2d | nn.Linear, layer: LayerScheme | None, unet: nn.Module, *, is_float32: bool
) -> LayerDryRun:
    weight = module.weight
    parts: tuple[int, ...] = (weight.shape[1],)
    label, size = "float", (_FLOAT_BYTES if is_float32 else weight.element_size()) * weight.numel()
    if layer is not None:
        label, parts = layer.label(), layer.input_widths
        size = _code_bytes(unet, layer) + _scale_bytes(unet, layer)
    kind = "conv2d" if isinstance(module, nn.Conv2d) else "linear"
    return LayerDryRun(
        name=name, kind=kind, scheme=label, parts=parts, shape=tuple(weight.shape), weight_bytes=size
    )
