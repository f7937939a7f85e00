"""`estimate`: what a compression will take, from one call of its network; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from statistics import median

import torch
from diffusers import DiffusionPipeline
from torch import nn

from errata.calibration import CalibrationSet
from errata.calibration.shards import shard_bytes
from errata.compress.jobs.dry_run import Preview
from errata.compress.jobs.image_judge import FEWEST_IMAGES, IMAGES
from errata.compress.jobs.preparation import Preparation
from errata.compress.jobs.stages import count_finished
from errata.compress.quantize.bias_correction import SAMPLES as BIAS_SAMPLES
from errata.compress.quantize.calibrated_output import SAMPLES as OUTPUT_SAMPLES
from errata.compress.quantize.histogram import BINS
from errata.compress.quantize.observation import StepRows
from errata.compress.quantize.quantizers import quantize_weight
from errata.compress.quantize.range_search import choose_range_by_histogram
from errata.compress.quantize.recorded_inputs import SAMPLES_PER_STEP, inputs_on
from errata.compress.rounding.blocks import blocks_of
from errata.estimates import Estimate, Need, disk_need
from errata.large_weights import in_stored_type, shared_size
from errata.memory import MemoryMeter, available_memory
from errata.runtime.layers import float_layer
from errata.runtime.output_map import OUTPUT_MAP
from errata.runtime.recipes.quantization import LearnedRounding
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.scheme import sites_of
from errata.runtime.unet import BranchedUNet

# What runs of other networks take, as multiples of a float call of as many samples: a simulated network and
# one whose inputs are observed, measured on the embedded model in CPU seconds of one thread, 2026-12-01; and
# a training step of learned rounding, forward and backward, which is a guess.
SIMULATED, OBSERVED, TRAINED = 2.9, 1.6, 9.0
# A cached call beside a full one, with three resnets recomputed, as on the embedded model.
_CACHED = 0.37
# Samples at once in the stages that hold most activations.
_BATCH = 32
# Samples of a larger call, which is made if that with one sample took less than so many seconds.
_LARGER_CALL, _SHORT = 32, 0.5
# Calls that are timed, if they are short.
_MOST_CALLS = 8
# The first call of a process takes up to a second more than those that follow: unless it took so long, there
# is a second one.
_LONG = 5.0
# A layer whose weight has at most so many elements is quantized to see what that takes.
_LARGEST_TRIED = 2**18
_FLOAT, _CODE = 4, 1


def estimate(
    pipe: DiffusionPipeline,
    calibration_set: CalibrationSet,
    recipe: Recipe | str,
    out: str | Path | None = None,
    *,
    samples_per_step: int = SAMPLES_PER_STEP,
    reuses: bool = False,
) -> Estimate:
    """Return what `compress` will take with the same arguments, from one or two float calls of the network.

    Nothing is written. The time is a sum over stages: evaluations of the float, observed and simulated
    network, each at its usual multiple of the measured call, and choices of ranges and codes, of which one
    each is timed. `check(error=...)` of the result refuses what cannot fit.

    Args:
        pipe: the float pipeline.
        calibration_set: its trajectories.
        recipe: a `Recipe` or the name of one.
        out: where the result will go; None looks at the space of the current directory.
        samples_per_step: as in `compress`.
        reuses: whether codes and ranges are taken from an earlier result.

    Raises:
        RecipeError: as `compress`.
    """
    recipe = Recipe.named(recipe) if isinstance(recipe, str) else recipe
    calls = _Calls.measured(pipe, calibration_set)
    work = _Counted(pipe, calibration_set, recipe, samples_per_step, reuses)
    seconds = calls.seconds * work.evaluations + work.choice_seconds
    disk, kept = work.result_bytes, work.kept_bytes
    place = Path() if out is None else Path(out)
    finished = 0 if out is None else count_finished(place)
    needed = work.memory_bytes(calls) + calls.meter.mapped
    return Estimate(
        work=f"compressing with {recipe.name} from {calibration_set.num_samples} samples",
        seconds=seconds,
        disk_bytes=disk,
        memory_bytes=None if calls.growth is None else calls.meter.held + needed,
        call_seconds=calls.seconds * calls.samples,
        call_samples=calls.samples,
        needs=(
            Need(
                what="memory",
                needed=needed,
                available=available_memory(),
                way_out="calibrate in smaller batches (`batch_size`), or use a machine with more memory",
            ),
            disk_need(place, disk + kept, way_out="choose another `out`"),
        ),
        notes=(f"{finished} stages are finished already and take no time again",) if finished else (),
    )


@dataclass(frozen=True, kw_only=True)
class _Calls:
    """A measured float call: seconds of a sample, samples in the call, bytes that a sample takes."""

    seconds: float
    samples: int
    growth: int | None
    meter: MemoryMeter

    @classmethod
    @torch.no_grad()
    def measured(cls, pipe: DiffusionPipeline, recorded: CalibrationSet) -> _Calls:
        """Return what one sample takes, and several where that is short."""
        meter = MemoryMeter(next(pipe.unet.parameters()).device.type)
        model, timestep = BranchedUNet(pipe.unet), float(recorded.timesteps[0])
        growths: list[int | None] = []
        for count in (1, min(_LARGER_CALL, recorded.num_samples)):
            record = next(recorded.batches(0, limit=count, batch_size=count))
            x, cond = inputs_on(pipe.unet, record)
            samples = len(x) // recorded.rows_per_sample
            meter.restart()
            seconds = _timed(lambda x=x, cond=cond: model.full(x, timestep, cond, branch=0))  # type: ignore[misc]
            growths.append(meter.growth())
            if seconds > _SHORT:
                break
        known = [growth for growth in growths if growth is not None]
        growth = None if len(known) < len(growths) else max(known) // samples
        return cls(seconds=seconds / samples, samples=samples, growth=growth, meter=meter)


def _timed(call: Callable[[], object]) -> float:
    """Return the median seconds of some calls without the first, or of that one if it took long."""
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken[1:]) < _SHORT and len(taken) <= _MOST_CALLS):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
        if taken[0] > _LONG:
            break
    return median(taken[1:] or taken)


class _Counted:
    """What the stages of a recipe do, counted."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        recorded: CalibrationSet,
        recipe: Recipe,
        samples_per_step: int,
        reuses: bool,
    ) -> None:
        self._pipe, self._set, self._recipe, self._reuses = pipe, recorded, recipe, reuses
        self._samples_per_step = samples_per_step
        self._scheme = Preparation.of(pipe, recipe).scheme
        self._preview = Preview.of(
            pipe, recipe, num_steps=recorded.num_steps, calls_per_step=recorded.calls_per_step
        )

    @property
    def evaluations(self) -> float:
        """Evaluations of the network for one sample, in float calls."""
        return self._observed + self._mapped + self._drawn + self._learned + self._corrected + self._of_cache

    @property
    def _quantizes(self) -> bool:
        return bool(self._scheme.layers) and not self._reuses

    @property
    def _is_judged(self) -> bool:
        """Whether there are enough trajectories to compare images of."""
        return self._set.num_samples >= FEWEST_IMAGES

    @property
    def _observed(self) -> float:
        if not self._quantizes:
            return 0.0
        rows = StepRows.of(self._set, samples_per_step=self._samples_per_step)
        return OBSERVED * sum(len(rows.samples_at(step)) for step in range(self._set.num_steps))

    @property
    def _mapped(self) -> float:
        """Evaluations for the calibrated output."""
        if self._scheme.output is None or not self._is_judged:
            return 0.0
        return (1 + SIMULATED) * self._set.num_steps * min(OUTPUT_SAMPLES, self._set.num_samples)

    @property
    def _drawn(self) -> float:
        """Evaluations for held-out images: the float model's, and those of what is compared."""
        compared = [2] * (self._scheme.output is not None) + [2] * (self._rounding is not None)
        compared += [2] * (self._preview.schedule is None)
        if not compared or not self._is_judged:
            return 0.0
        images = min(IMAGES, self._set.num_samples)
        return images * self._set.num_steps * (1 + SIMULATED * self._part_of_full * sum(compared))

    @property
    def _part_of_full(self) -> float:
        """What a call of the cache schedule takes on average, beside a full one."""
        schedule = self._preview.schedule
        if schedule is None:
            cache = self._recipe.cache
            full = 1 / (cache.interval or 1) if cache is not None else 1.0
        else:
            full = len(schedule.full_steps) / schedule.num_steps
        return full + (1 - full) * _CACHED

    @property
    def _rounding(self) -> LearnedRounding | None:
        quantization = self._recipe.quantization
        return None if quantization is None or self._reuses else quantization.rounding

    @property
    def _learned(self) -> float:
        """Evaluations for learned rounding: each block is trained, on inputs that run half the network."""
        if self._rounding is None:
            return 0.0
        blocks = len(blocks_of(self._pipe.unet, self._scheme))
        captured = blocks * self._rounding.samples * (1 + SIMULATED) / 2
        rows = self._rounding.iterations * self._rounding.batch_size
        return captured + TRAINED * rows / self._set.rows_per_sample

    @property
    def _corrected(self) -> float:
        """Evaluations for bias correction: both networks run half for each block."""
        quantization = self._recipe.quantization
        if quantization is None or not quantization.bias_correction or self._reuses:
            return 0.0
        return len(blocks_of(self._pipe.unet, self._scheme)) * BIAS_SAMPLES * (1 + SIMULATED) / 2

    @property
    def _of_cache(self) -> float:
        """Evaluations for a searched schedule, and for the correction of a cache."""
        samples = self._set.num_steps * min(SAMPLES_PER_STEP, self._set.num_samples)
        corrected = (1 + SIMULATED) * samples if self._scheme.correction is not None else 0.0
        return corrected + samples * (self._preview.schedule is None)

    @cached_property
    def choice_seconds(self) -> float:
        """Seconds for codes of weights and for ranges, of which some are made to see."""
        if not self._quantizes:
            return 0.0
        counts = torch.zeros(BINS, dtype=torch.int32)
        counts[BINS // 4 : 3 * BINS // 4] = 100
        low, high = torch.tensor(-1.0), torch.tensor(1.0)
        ranges = _timed(lambda: choose_range_by_histogram(counts, low, high, bits=8))
        return ranges * len(sites_of(self._scheme)) * self._set.num_steps + self._weight_seconds()

    def _weight_seconds(self) -> float:
        """Return the seconds for all weights, from a small one and a larger one."""
        weights = [float_layer(self._pipe.unet, layer.name).weight for layer in self._scheme.layers]
        sizes = sorted((weight.numel(), place) for place, weight in enumerate(weights))
        larger = max([size for size in sizes if size[0] <= _LARGEST_TRIED] or sizes[:1])
        times = [
            _timed(lambda place=place: quantize_weight(weights[place].detach().float().cpu(), bits=8))  # type: ignore[misc]
            for _, place in (sizes[0], larger)
        ]
        slope = max(0.0, times[1] - times[0]) / max(1, larger[0] - sizes[0][0])
        return sum(times[0] + slope * (size - sizes[0][0]) for size, _ in sizes)

    def memory_bytes(self, calls: _Calls) -> int:
        """Return the peak beyond the float pipeline: copies of the network, and activations of a batch.

        Copies share large weights, of which one at a time is converted. What is small is there twice beside
        the pipeline: in the copy that computes in float32, and in the observed or simulated one.
        """
        values = [value.numel() for value in self._pipe.unet.state_dict().values()]
        parameters = sum(values)
        small = _FLOAT * (parameters - shared_size(self._pipe.unet))
        samples = min(_BATCH, self._set.num_samples, self._set.batch_size)
        activations = samples * (calls.growth or 0)
        if not self._scheme.layers:
            return small + activations
        return 2 * small + _CODE * parameters + 2 * _FLOAT * max(values) + activations

    @cached_property
    def _table(self) -> dict[str, tuple[torch.dtype, Sequence[int]]]:
        """Type and shape of what is stored of codes, scales and ranges."""
        steps, table = self._set.num_steps, dict[str, tuple[torch.dtype, Sequence[int]]]()
        for layer in self._scheme.layers:
            shape = float_layer(self._pipe.unet, layer.name).weight.shape
            table[f"{layer.name}.codes"] = (torch.int8, shape)
            table[f"{layer.name}.weight_scale"] = (torch.float32, (len(layer.input_widths), shape[0]))
        for site in sites_of(self._scheme):
            table[f"{site.name}.scale"] = (torch.float32, (steps,))
            table[f"{site.name}.zero_point"] = (torch.uint8, (steps,))
        if self._scheme.output is not None:
            channels = self._scheme.output.channels
            shapes = ((steps, channels, channels), (steps, channels))
            table |= dict(zip(OUTPUT_MAP, ((torch.float32, shape) for shape in shapes), strict=True))
        return table

    @cached_property
    def result_bytes(self) -> int:
        """Bytes of the result: the float pipeline's tensors, and the table; without small text files."""
        correction = self._preview.sizes.get("cache correction", 0)
        return _pipeline_bytes(self._pipe) + shard_bytes(self._table) + correction

    @property
    def kept_bytes(self) -> int:
        """Bytes of finished stages, which stay until the result is complete."""
        images = 5 * IMAGES * prod(self._set.sample_shape) * _FLOAT
        return shard_bytes(self._table) + images + self._scratch_bytes

    @property
    def _scratch_bytes(self) -> int:
        """Bytes of the inputs and targets of the largest block, while it is learned."""
        if self._rounding is None:
            return 0
        channels = max(getattr(self._pipe.unet.config, "block_out_channels", (1,))[:1])
        positions = prod(self._set.sample_shape[1:])
        return 4 * _FLOAT * self._rounding.samples * self._set.rows_per_sample * channels * positions


def _pipeline_bytes(pipe: DiffusionPipeline) -> int:
    """Return the bytes of the tensors of all networks of a pipeline, with the headers of their files."""
    networks = [in_stored_type(part) for part in pipe.components.values() if isinstance(part, nn.Module)]
    return sum(_network_bytes(network.state_dict()) for network in networks)


def _network_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    described = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    return shard_bytes(described, metadata={"format": "pt"})
