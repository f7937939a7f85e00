"""Activation ranges of every quantizer at every step, from recorded trajectories."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from tqdm import tqdm

from errata.calibration import CalibrationSet
from errata.compress.attention import QuantizedAttention, set_attention
from errata.compress.ranges import choose_range
from errata.compress.scheme import LayerScheme, Scheme
from errata.compress.unet import BranchedUNet

# Timestep-wise calibration keeps 64 samples a step for CIFAR-10 (CacheQuant, public code).
SAMPLES_PER_STEP = 64
_BATCH_SIZE = 32
# Values kept of each activation tensor besides its extremes: memory grows with layers, never with samples.
_VALUES_PER_BATCH = 8192


@dataclass(frozen=True)
class Site:
    """One activation quantizer: where it sits and what it may assume."""

    name: str
    bits: int
    from_zero: bool = False


def layer_sites(layer: LayerScheme) -> tuple[Site, ...]:
    """Sites at the input of a layer, one for each part; none where the input stays in floating point."""
    if layer.activation_bits is None:
        return ()
    return tuple(
        Site(f"{layer.name}.input.{part}", layer.activation_bits) for part in range(len(layer.input_widths))
    )


def sites_of(scheme: Scheme) -> tuple[Site, ...]:
    """All activation quantizers of a scheme, layers first."""
    layers = [site for layer in scheme.layers for site in layer_sites(layer)]
    attentions = [
        Site(name, attention.bits, from_zero=name.endswith(".probabilities"))
        for attention in scheme.attentions
        for name in attention.sites
    ]
    return (*layers, *attentions)


class ValueSample:
    """A bounded random sample of a stream of tensors, its extremes included."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._chunks: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Keep up to `_VALUES_PER_BATCH` values of `x` and its extremes."""
        flat = x.detach().flatten().float()
        if flat.numel() > _VALUES_PER_BATCH:
            index = torch.randint(flat.numel(), (_VALUES_PER_BATCH,), generator=self._generator)
            flat = torch.cat([flat[index.to(flat.device)], torch.stack(torch.aminmax(flat))])
        self._chunks.append(flat.cpu())

    def values(self) -> Tensor:
        """Everything kept, one-dimensional."""
        return torch.cat(self._chunks)


def observe_ranges(
    unet: UNet2DModel, calibration_set: CalibrationSet, scheme: Scheme
) -> dict[str, tuple[Tensor, Tensor]]:
    """`(scale, zero_point)`, each `(T,)`, of every site, from full passes of the float UNet at every step.

    Every step is observed in full, also those that a cache schedule will skip: correctors run full passes
    anywhere. `unet` itself is left alone. Memory grows with the number of layers, not of trajectories.
    """
    sites = sites_of(scheme)
    if not sites:
        return {}
    observed = copy.deepcopy(unet).eval()  # as `collect` and the simulation run it
    columns: dict[str, list[tuple[Tensor, Tensor]]] = {site.name: [] for site in sites}
    steps = range(calibration_set.num_steps)
    for step in tqdm(
        steps, desc="activation ranges", unit="step", disable=None
    ):  # None: not without a terminal
        samples = _observe_step(observed, calibration_set, scheme, step)
        for site in sites:
            values = samples[site.name].values()
            columns[site.name].append(choose_range(values, bits=site.bits, from_zero=site.from_zero))
    return {
        name: (torch.stack([scale for scale, _ in pairs]), torch.stack([zero for _, zero in pairs]))
        for name, pairs in columns.items()
    }


@torch.no_grad()
def _observe_step(
    unet: UNet2DModel, calibration_set: CalibrationSet, scheme: Scheme, step: int
) -> dict[str, ValueSample]:
    generator = torch.Generator().manual_seed(step)
    samples = {site.name: ValueSample(generator) for site in sites_of(scheme)}
    device = next(unet.parameters()).device
    model = BranchedUNet(unet)
    with _watching(unet, scheme, samples):
        for record in calibration_set.batches(step, limit=SAMPLES_PER_STEP, batch_size=_BATCH_SIZE):
            cond = {name: value.to(device) for name, value in record.cond.items()}
            timestep = float(calibration_set.timesteps[step])
            model.full(record.sample.to(device, unet.dtype), timestep, cond, branch=0)
    return samples


@contextmanager
def _watching(unet: UNet2DModel, scheme: Scheme, samples: dict[str, ValueSample]) -> Iterator[None]:
    handles = [
        unet.get_submodule(layer.name).register_forward_pre_hook(_layer_hook(layer, samples))
        for layer in scheme.layers
        if layer.activation_bits is not None
    ]
    for attention in scheme.attentions:
        query, key, value, probabilities = (_recorder(samples[name]) for name in attention.sites)
        processor = QuantizedAttention(query=query, key=key, value=value, probabilities=probabilities)
        set_attention(unet, attention.name, processor)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_hook(
    layer: LayerScheme, samples: dict[str, ValueSample]
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dim = 1 if layer.kind == "conv2d" else -1
        parts = inputs[0].split(list(layer.input_widths), dim=dim)
        for site, part in zip(layer_sites(layer), parts, strict=True):
            samples[site.name].add(part)

    return hook


def _recorder(sample: ValueSample) -> Callable[[Tensor], Tensor]:
    def record(x: Tensor) -> Tensor:
        sample.add(x)
        return x

    return record
