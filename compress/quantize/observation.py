"""Activation ranges of every quantizer at every step, from recorded trajectories."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil

import torch
from torch import Tensor, nn
from tqdm import tqdm

from errata.calibration import CalibrationSet
from errata.compress.jobs.progress import StepProgress
from errata.compress.quantize.quantizers import choose_range
from errata.compress.quantize.recorded_inputs import SAMPLES_PER_STEP, inputs_on
from errata.errors import RecipeError
from errata.journal import Stage, without_journal
from errata.runtime.attention import QuantizedAttention, set_attention
from errata.runtime.scheme import LayerScheme, Scheme, Site, layer_sites, sites_of
from errata.runtime.unet import BranchedUNet

_BATCH_SIZE = 32
# Values kept of each quantizer's inputs at one step, besides their extremes: memory grows with layers, never
# with samples. The error of a range is a mean over them; twice as many change few ranges.
_VALUES_PER_STEP = 16384


class StepSample:
    """A bounded random sample of what every site sees at one step, extremes included.

    Args:
        samples: how many samples the step has in all; each may keep its share of the values.
        seed: of the choice of values.
    """

    def __init__(self, *, samples: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._samples = samples
        self._limit = _VALUES_PER_STEP
        # One buffer a site: small tensors kept between large ones would scatter over the heap and pin it.
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def expect(self, samples: int) -> None:
        """Set how many samples the next batch has."""
        self._limit = ceil(_VALUES_PER_STEP * samples / self._samples)

    def add(self, site: str, x: Tensor) -> None:
        """Keep the batch's share of the values of `x`, and its extremes."""
        flat = x.detach().flatten().float()
        if flat.numel() == 0:
            return
        if site not in self._values:
            self._values[site] = torch.empty(_VALUES_PER_STEP + 2)
            self._values[site][-2:] = flat[0].cpu()
        values = self._values[site]
        low, high = (value.cpu() for value in torch.aminmax(flat))
        values[-2], values[-1] = torch.minimum(values[-2], low), torch.maximum(values[-1], high)
        start = self._counts.get(site, 0)
        end = min(start + min(self._limit, flat.numel()), _VALUES_PER_STEP)
        if end - start < flat.numel():
            index = torch.randint(flat.numel(), (end - start,), generator=self._generator)
            flat = flat[index.to(flat.device)]
        values[start:end] = flat.cpu()
        self._counts[site] = end

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that were seen, in the order in which the network ran them."""
        return tuple(self._values)

    def values(self, site: str) -> Tensor:
        """Return everything kept of a site, one-dimensional; empty if its layer did not run."""
        if site not in self._values:
            return torch.empty(0)
        return torch.cat([self._values[site][: self._counts[site]], self._values[site][-2:]])


def observe_ranges(
    unet: nn.Module,
    calibration_set: CalibrationSet,
    scheme: Scheme,
    *,
    steps: Sequence[int] | None = None,
    samples_per_step: int = SAMPLES_PER_STEP,
    stage: Stage = without_journal,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `(scale, zero_point)`, each `(T,)`, of every site, from full passes of the float UNet.

    Every step is observed in full, also those that a cache schedule will skip: correctors run full passes
    anywhere. `unet` itself is left alone. Memory grows with the number of layers, not of trajectories.

    Args:
        unet: the float network.
        calibration_set: its trajectories.
        scheme: what is quantized.
        steps: the steps to observe, one entry of the result for each; None means all.
        samples_per_step: trajectories to look at, at most.
        stage: where the ranges of a finished step are kept, for a run that continues later.

    Raises:
        RecipeError: a quantizer's input is not finite, or its layer does not run.
    """
    sites = sites_of(scheme)
    if not sites:
        return {}
    observed = copy.deepcopy(unet).eval()  # as `calibrate` and the simulation run it
    chosen = range(calibration_set.num_steps) if steps is None else steps
    total = len(chosen)
    columns: list[dict[str, Tensor]] = []
    lines = StepProgress("activation ranges", total)
    # None: not without a terminal
    with tqdm(total=total, desc="activation ranges", unit="step", disable=None) as bar:
        for done, step in enumerate(chosen, start=1):
            made: list[int] = []

            def make(step: int = step, made: list[int] = made) -> dict[str, Tensor]:
                made.append(step)
                sample = _observe_step(observed, calibration_set, scheme, step, samples_per_step)
                return _ranges_at(step, sample, sites)

            columns.append(stage(f"ranges.{step:04d}", make))
            bar.update()
            if bar.disable:
                lines.update(done, is_resumed=not made)
    return {
        site.name: (
            torch.stack([column[f"{site.name}.scale"] for column in columns]),
            torch.stack([column[f"{site.name}.zero_point"] for column in columns]),
        )
        for site in sites
    }


def _ranges_at(step: int, sample: StepSample, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    """Return `<site>.scale` and `<site>.zero_point`, scalars."""
    ranges: dict[str, Tensor] = {}
    order = {name: place for place, name in enumerate(sample.sites)}
    # As the network runs them, so that the first to see a NaN is the one to be named.
    for site in sorted(sites, key=lambda site: order.get(site.name, len(order))):
        try:
            scale, zero_point = choose_range(
                sample.values(site.name), bits=site.bits, from_zero=site.from_zero
            )
        except ValueError as problem:
            raise RecipeError(
                f"no range can be chosen for {site.name!r} at step {step}: {problem}; keep its layer in "
                "floating point (modules_to_not_convert, --keep), or check the model"
            ) from problem
        ranges |= {f"{site.name}.scale": scale, f"{site.name}.zero_point": zero_point}
    return ranges


@torch.no_grad()
def _observe_step(
    unet: nn.Module, calibration_set: CalibrationSet, scheme: Scheme, step: int, samples_per_step: int
) -> StepSample:
    limit = min(samples_per_step, calibration_set.num_samples)
    sample = StepSample(samples=limit, seed=step)
    model = BranchedUNet(unet)
    timestep = float(calibration_set.timesteps[step])
    with _watching(unet, scheme, sample):
        for record in calibration_set.batches(step, limit=limit, batch_size=_BATCH_SIZE):
            x, cond = inputs_on(unet, record)
            sample.expect(len(x) // calibration_set.rows_per_sample)
            model.full(x, timestep, cond, branch=0)
    return sample


@contextmanager
def _watching(unet: nn.Module, scheme: Scheme, sample: StepSample) -> Iterator[None]:
    handles = [
        unet.get_submodule(layer.name).register_forward_pre_hook(_layer_hook(layer, sample))
        for layer in scheme.layers
        if layer.activation_bits is not None
    ]
    for attention in scheme.attentions:
        query, key, value, probabilities = (_recorder(name, sample) for name in attention.sites)
        processor = QuantizedAttention(query=query, key=key, value=value, probabilities=probabilities)
        set_attention(unet, attention.name, processor)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_hook(layer: LayerScheme, sample: StepSample) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        dim = 1 if layer.kind == "conv2d" else -1
        parts = inputs[0].split(list(layer.input_widths), dim=dim)
        for site, part in zip(layer_sites(layer), parts, strict=True):
            sample.add(site.name, part)

    return hook


def _recorder(site: str, sample: StepSample) -> Callable[[Tensor], Tensor]:
    def record(x: Tensor) -> Tensor:
        sample.add(site, x)
        return x

    return record
