"""Measure what cheap steps besides rounding gain: equalization, bias correction, more bits for few layers.

    python benchmarks/cheap_steps.py --work runs/cheap_steps --steps 25

The error is that of the whole network's prediction against the float network, ||eps_q - eps|| / ||eps||, at
recorded inputs of mixed steps that were not used for calibration; errors of earlier steps have no effect. For
bias correction it also prints the distance of whole images from those of the float network, from the same
noise, where errors do accumulate. Calibration sets are kept in --work. --text also compares the equalizations
on a text-conditional network with random weights; it has every kind of link, but its channels lack the
outliers of a trained network.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from work_folder import recorded

from errata import calibration
from errata.calibration import CalibrationSet, Record
from errata.compress import Quantization, Recipe
from errata.compress.quantize.bias_correction import correct_biases
from errata.compress.quantize.equalization import Link, equalize_, links, rescale_
from errata.compress.quantize.observation import observe_ranges
from errata.compress.quantize.recorded_inputs import MixedRows, mixed_rows
from errata.compress.quantize.sensitivity import measure
from errata.compress.quantize.simulation import quantize_weights, range_table, simulate
from errata.embedded import PIPELINE
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext

Table = dict[str, Tensor]
# Share of the activations' range in a factor; 0 looks at weights only, 0.5 is SmoothQuant's own choice.
ALPHAS = (0.0, 0.5)
TOP = (1, 2, 4, 8, 16, 32)
W4A8 = Quantization(weight_bits=4, activation_bits=8)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description="What equalization, bias correction and mixed bits bring.")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for calibration sets; reused if it exists"
    )
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=64, help="recorded trajectories to calibrate on (default: %(default)s)"
    )
    parser.add_argument(
        "--text", action="store_true", help="also measure a text-conditional network with random weights"
    )
    options = parser.parse_args()
    pipe = calibration.load_pipeline(PIPELINE)
    calibrated = collect(pipe, options, samples=options.samples, seed=0)
    held_out = collect(pipe, options, samples=32, seed=100_000)
    print(f"embedded model, {options.steps} steps, {options.samples} trajectories; w4a8, nearest")
    compare(pipe.unet, calibrated, held_out, pipe)
    mixed_precision(pipe, calibrated, held_out)
    if options.text:
        print("text-conditional network with random weights; w4a8, nearest")
        compare(text_unet(), RandomInputs(0), RandomInputs(1), None)


def collect(
    pipe: DiffusionPipeline, options: argparse.Namespace, *, samples: int, seed: int
) -> CalibrationSet:
    """Return trajectories, recorded unless they are there."""
    folder = options.work / f"calibration-{options.steps}-{samples}-{seed}"
    return recorded(pipe, folder, steps=options.steps, samples=samples, batch_size=32, seed=seed)


def compare(
    unet: nn.Module, calibrated: CalibrationSet, held_out: CalibrationSet, pipe: DiffusionPipeline | None
) -> None:
    """Every equalization; plain weights and the library's own way with bias correction too."""
    scheme = Scheme.of(unet, Recipe(quantization=W4A8), branch=0)
    rows = mixed_rows(held_out, samples=256, batch_size=64)
    ways: dict[str, Callable[[nn.Module], object]] = {
        "plain": lambda subject: None,
        "dilation": lambda subject: equalize_(subject, scheme),
    }
    for alpha in ALPHAS:
        ways[f"smoothing {alpha}"] = lambda subject, alpha=alpha: smooth_(subject, calibrated, alpha)
    for name, change_ in ways.items():
        subject = copy.deepcopy(unet)
        change_(subject)
        table = quantize_weights(subject, scheme) | range_table(observe_ranges(subject, calibrated, scheme))
        show(
            name,
            error_of(unet, subject, scheme, table, rows),
            error_of(unet, unet, Scheme(), {}, rows, subject),
        )
        if pipe is not None and not name.startswith("smoothing"):
            start = time.perf_counter()
            biases = correct_biases(subject, calibrated, scheme, table, stage=lambda _, make: make())
            seconds = time.perf_counter() - start
            error = error_of(unet, subject, scheme, {**table, **biases}, rows)
            print(f"{name + ' + biases':<24} {error:8.4%}   ({seconds:.0f} s)", flush=True)
            for label, tensors in ((name, table), (f"{name} + biases", {**table, **biases})):
                show_images(label, pipe, subject, scheme, tensors)


def show(name: str, error: float, float_error: float) -> None:
    """One line; the changed float network is checked against the original one."""
    print(f"{name:<24} {error:8.4%}   (float network moved by {float_error:.1e})", flush=True)


@torch.no_grad()
def show_images(
    name: str, pipe: DiffusionPipeline, subject: nn.Module, scheme: Scheme, table: Table, count: int = 32
) -> None:
    """How far whole images are from the float network's, from the same noise; pixels lie in [-1, 1]."""
    context, steps = StepContext(), len(table[f"{scheme.attentions[0].sites[0]}.scale"])

    def images(unet: nn.Module) -> Tensor:
        scheduler = copy.deepcopy(pipe.scheduler)
        scheduler.set_timesteps(steps)
        x = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(9))
        for step, timestep in enumerate(scheduler.timesteps):
            with context.at(step):
                prediction = unet(x, timestep).sample
            x = scheduler.step(prediction, timestep, x).prev_sample
        return x

    gap = images(simulate(subject, scheme, table, context)) - images(pipe.unet)
    print(f"  images of {name}: RMS {gap.square().mean().sqrt():.4f}, mean {gap.mean():+.4f}", flush=True)


@torch.no_grad()
def error_of(
    unet: nn.Module,
    subject: nn.Module,
    scheme: Scheme,
    table: Table,
    rows: Sequence[MixedRows],
    float_subject: nn.Module | None = None,
) -> float:
    """Relative error of the simulated `subject`, or of `float_subject`, against `unet`."""
    context = StepContext()
    tested = float_subject or simulate(subject, scheme, table, context)
    wrong = total = 0.0
    for batch in rows:
        with context.at(batch.steps):
            expected, found = batch.predict(unet), batch.predict(tested)
        wrong += float((found - expected).square().sum())
        total += float(expected.square().sum())
    return (wrong / total) ** 0.5


@torch.no_grad()
def smooth_(unet: nn.Module, calibrated: CalibrationSet, alpha: float) -> None:
    """Factors from ranges of activations and weights, without a bound, on the same links as the library's.

    Source: SmoothQuant (Xiao et al., 2023, equation 4) with the roles of data and parameters as there.
    """
    ranges = input_ranges(unet, calibrated)
    for link in links(unet):
        weights = [unet.get_submodule(name).weight.detach() for name in link.readers]
        largest = torch.cat([weight.flatten(2).amax(2) if weight.ndim > 2 else weight for weight in weights])
        width = largest.abs().amax(dim=0).clamp(min=1e-5)
        activation = ranges[link.readers[0]].clamp(min=1e-5)
        rescale_(unet, Link(**vars(link)), activation**alpha / width ** (1 - alpha))


def input_ranges(unet: nn.Module, calibrated: CalibrationSet) -> dict[str, Tensor]:
    """Largest magnitude of every input channel of every reader, over mixed steps."""
    ranges: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].movedim(1, -1) if isinstance(module, nn.Conv2d) else inputs[0]
            largest = x.abs().flatten(0, -2).amax(dim=0)
            ranges[name] = torch.maximum(ranges.get(name, largest), largest)

        return keep

    names = {name for link in links(unet) for name in link.readers}
    handles = [unet.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    for batch in mixed_rows(calibrated, samples=256, batch_size=64):
        batch.predict(unet)
    for handle in handles:
        handle.remove()
    return ranges


def mixed_precision(pipe: DiffusionPipeline, calibrated: CalibrationSet, held_out: CalibrationSet) -> None:
    """Error and size with the most sensitive layers at 8 bits, against as many taken at random."""
    start = time.perf_counter()
    sensitivity = measure(pipe, calibrated, Recipe(quantization=W4A8), samples=16, steps=5)
    print(f"\nsensitivity, {time.perf_counter() - start:.0f} s")
    print("\n".join([*sensitivity.text().splitlines()[:17], "…", sensitivity.suggestion()]), flush=True)
    rows = mixed_rows(held_out, samples=256, batch_size=64)
    tables = {bits: codes_at(pipe.unet, bits) for bits in (4, 8)}
    scheme = Scheme.of(pipe.unet, Recipe(quantization=W4A8), branch=0)
    ranges = range_table(observe_ranges(pipe.unet, calibrated, scheme))
    four = [row for row in sensitivity.ranked() if row.weight_bits == 4]
    by_gain = sorted(four, key=lambda row: -(row.mean**2) / row.weights)

    def measured(names: Sequence[str]) -> tuple[float, int]:
        quantization = Quantization(weight_bits=4, activation_bits=8, bits=dict.fromkeys(names, 8))
        chosen = Scheme.of(pipe.unet, Recipe(quantization=quantization), branch=0)
        table = dict(ranges)
        for layer in chosen.layers:
            for kind in ("codes", "weight_scale"):
                table[f"{layer.name}.{kind}"] = tables[layer.weight_bits][f"{layer.name}.{kind}"]
        size = sum(table[f"{layer.name}.codes"].numel() * layer.weight_bits // 8 for layer in chosen.layers)
        return error_of(pipe.unet, pipe.unet, chosen, table, rows), size

    print(f"\n{'8 bits for':<14} {'worst first':>20} {'by gain per weight':>20} {'random (3 draws)':>20}")
    names = [row.name for row in four]
    for count in (0, *TOP, len(four)):
        draws = [measured(random.Random(seed).sample(names, count)) for seed in range(3)]
        mean = tuple(sum(values) / 3 for values in zip(*draws, strict=True))
        cells = [measured(names[:count]), measured([row.name for row in by_gain[:count]]), mean]
        print(
            f"{count:<14} " + " ".join(f"{error:9.4%} {size / 1024:6.0f} KiB" for error, size in cells),
            flush=True,
        )


def codes_at(unet: nn.Module, bits: int) -> Table:
    """Codes and scales of all layers at that width, 8-bit ones at 8."""
    quantization = Quantization(weight_bits=bits, activation_bits=8)
    return quantize_weights(unet, Scheme.of(unet, Recipe(quantization=quantization), branch=0))


def text_unet() -> UNet2DConditionModel:
    """A small text-conditional network; its normalizations have gains of their own."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8, norm_num_groups=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            nn.init.trunc_normal_(module.bias, std=0.2)
            module.weight.data.log_normal_(0.0, 0.5)
    return unet


class RandomInputs(CalibrationSet):
    """Noise and random text at four timesteps, in place of recorded trajectories."""

    def __init__(self, seed: int) -> None:
        self._seed_of_inputs = seed

    @property
    def num_steps(self) -> int:
        """Four."""
        return 4

    @property
    def num_samples(self) -> int:
        """A step."""
        return 32

    @property
    def rows_per_sample(self) -> int:
        """No guidance."""
        return 1

    @property
    def timesteps(self) -> tuple[float, ...]:
        """From noisy to clean."""
        return (900, 600, 300, 0)

    def batches(self, step: int, *, limit: int | None = None, batch_size: int | None = None) -> Iterator[Any]:
        """The same values every time."""
        generator = torch.Generator().manual_seed(1000 * self._seed_of_inputs + step)
        count = min(limit or 32, 32)
        x = torch.randn(32, 4, 16, 16, generator=generator)[:count]
        text = torch.randn(32, 7, 32, generator=generator)[:count]
        size = batch_size or count
        for first in range(0, count, size):
            cond = {"encoder_hidden_states": text[first : first + size]}
            time_of_step = torch.tensor(self.timesteps[step])
            yield Record(sample=x[first : first + size], timestep=time_of_step, cond=cond, step=step)


if __name__ == "__main__":
    main()
