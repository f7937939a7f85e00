"""Which layers low bits hurt: error of the whole network when a single one of them is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from errata.calibration import CalibrationSet
from errata.compress.jobs.preparation import check_weights
from errata.compress.quantize.observation import observe_ranges
from errata.compress.quantize.recorded_inputs import MixedRows
from errata.compress.quantize.sensitivity_table import SensitivityRow, SensitivityTable
from errata.compress.quantize.simulation import quantize_weights, range_table, simulate
from errata.errors import CalibrationError, RecipeError
from errata.large_weights import sharing_copy
from errata.runtime.attention import QuantizedAttention, set_attention
from errata.runtime.layers import replace_module
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext

__all__ = ["SensitivityRow", "SensitivityTable", "measure"]

_BATCH_SIZE = 16

Swap = Callable[[], AbstractContextManager[None]]


@torch.no_grad()
def measure(
    pipe: DiffusionPipeline,
    calibration_set: CalibrationSet,
    recipe: Recipe | str,
    *,
    samples: int = 16,
    steps: int | Sequence[int] | None = None,
) -> SensitivityTable:
    """Quantize one layer, or the matrix products of one attention, at a time, and run the whole network.

    The error of a step is `||eps_q - eps|| / ||eps||` over the recorded inputs of that step, so errors of
    earlier steps do not enter. Weights are rounded to nearest; equalization, bias correction, learned
    rounding and cache of the recipe are left out. `pipe` is left as it was.

    Costs one evaluation of the network for each layer, attention, step and batch of 16 samples. Memory:
    three copies of the network and one batch.

    Args:
        pipe: the float pipeline.
        calibration_set: its trajectories.
        recipe: bits, and which layers have others or none.
        samples: recorded samples a step.
        steps: None means all; a number means so many, evenly spaced from first to last; or the steps.

    Raises:
        RecipeError: the recipe quantizes nothing, or does not fit this UNet.
        CalibrationError: the trajectories come from another model, or a step or number is not allowed.

    Source: one-at-a-time sensitivity as in HAWQ and ZeroQ (Cai et al., 2020, section 3.2), with the relative
        error of the prediction instead of a KL divergence.
    """
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    if recipe.quantization is None:
        raise RecipeError(f"recipe {recipe.name} quantizes nothing, so there is no sensitivity to measure")
    if samples < 1:
        raise CalibrationError(f"samples={samples}; allowed are whole numbers of at least 1")
    chosen = _chosen_steps(calibration_set.num_steps, steps)
    check_weights(pipe.unet, calibration_set)
    scheme = Scheme.of(pipe.unet, Recipe(quantization=recipe.quantization), branch=0)
    subject = sharing_copy(pipe.unet, torch.float32)
    context = StepContext()
    swaps = _swaps(subject, _simulated(subject, calibration_set, scheme, chosen, context), scheme)
    errors: dict[str, list[float]] = {name: [] for name in swaps}
    with tqdm(total=len(chosen) * len(swaps), desc="sensitivity", unit="layer", disable=None) as bar:
        for position, step in enumerate(chosen):
            batches = [
                MixedRows.of([record])
                for record in calibration_set.batches(step, limit=samples, batch_size=_BATCH_SIZE)
            ]
            with context.at(position):
                for name, error in _step_errors(subject, swaps, batches).items():
                    errors[name].append(error)
            bar.update(len(swaps))
    return _table(subject, scheme, recipe, errors, steps=chosen, samples=samples)


def _simulated(
    unet: nn.Module,
    calibration_set: CalibrationSet,
    scheme: Scheme,
    steps: Sequence[int],
    context: StepContext,
) -> nn.Module:
    """Return the network with everything quantized; its step is the position in `steps`."""
    ranges = observe_ranges(unet, calibration_set, scheme, steps=steps)
    return simulate(unet, scheme, quantize_weights(unet, scheme) | range_table(ranges), context)


def _step_errors(
    subject: nn.Module, swaps: Mapping[str, Swap], batches: Sequence[MixedRows]
) -> dict[str, float]:
    """Return the relative error by name, each with that one alone swapped in."""
    squares = dict.fromkeys(swaps, 0.0)
    total = 0.0
    for batch in batches:
        rows = batch.to(next(subject.parameters()).device)
        original = rows.predict(subject)
        total += _energy(original)
        for name, swapped in swaps.items():
            with swapped():
                squares[name] += _energy(rows.predict(subject) - original)
    if total == 0.0:
        raise CalibrationError("the network predicts nothing but zeros; a relative error has no meaning")
    return {name: (square / total) ** 0.5 for name, square in squares.items()}


def _energy(x: Tensor) -> float:
    return float(x.double().square().sum())


def _swaps(subject: nn.Module, simulated: nn.Module, scheme: Scheme) -> dict[str, Swap]:
    """Return, by name, what puts the quantized layer or attention in place for the length of a `with`."""
    swaps: dict[str, Swap] = {}
    for layer in scheme.layers:
        swaps[layer.name] = _layer_swap(subject, layer.name, simulated.get_submodule(layer.name))
    for attention in scheme.attentions:
        module: Any = simulated.get_submodule(attention.name)
        swaps[attention.name] = _attention_swap(subject, attention.name, module.processor)
    return swaps


def _layer_swap(subject: nn.Module, name: str, quantized: nn.Module) -> Swap:
    original = subject.get_submodule(name)

    @contextmanager
    def swapped() -> Iterator[None]:
        replace_module(subject, name, quantized)
        try:
            yield
        finally:
            replace_module(subject, name, original)

    return swapped


def _attention_swap(subject: nn.Module, name: str, quantized: QuantizedAttention) -> Swap:
    attention: Any = subject.get_submodule(name)
    original = attention.processor

    @contextmanager
    def swapped() -> Iterator[None]:
        set_attention(subject, name, quantized)
        try:
            yield
        finally:
            attention.set_processor(original)

    return swapped


def _chosen_steps(num_steps: int, steps: int | Sequence[int] | None) -> tuple[int, ...]:
    if steps is None:
        return tuple(range(num_steps))
    if isinstance(steps, int):
        if not 1 <= steps <= num_steps:
            raise CalibrationError(
                f"steps={steps}; {num_steps} steps were recorded; allowed are 1 to {num_steps}"
            )
        return tuple(round(position * (num_steps - 1) / max(1, steps - 1)) for position in range(steps))
    chosen = tuple(sorted(set(steps)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_steps:
        raise CalibrationError(f"steps={list(steps)}; recorded steps are 0-{num_steps - 1}")
    return chosen


def _table(
    unet: nn.Module,
    scheme: Scheme,
    recipe: Recipe,
    errors: Mapping[str, Sequence[float]],
    *,
    steps: tuple[int, ...],
    samples: int,
) -> SensitivityTable:
    rows = [
        SensitivityRow(
            name=layer.name,
            scheme=layer.label(),
            weight_bits=layer.weight_bits,
            weights=unet.get_parameter(f"{layer.name}.weight").numel(),
            errors=tuple(errors[layer.name]),
        )
        for layer in scheme.layers
    ]
    rows += [
        SensitivityRow(
            name=attention.name,
            scheme=f"attention a{attention.bits}",
            weight_bits=None,
            weights=0,
            errors=tuple(errors[attention.name]),
        )
        for attention in scheme.attentions
    ]
    return SensitivityTable(recipe=recipe.name, steps=steps, samples=samples, rows=tuple(rows))
