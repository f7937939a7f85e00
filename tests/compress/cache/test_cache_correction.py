import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, EulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn import functional

from errata.calibration import CalibrationSet
from errata.calibration.calibration_set import Record
from errata.compress import CacheQuant, CacheSchedule, CompressedPipeline, Recipe
from errata.compress.cache import cache_features
from errata.compress.cache.cache_correction import fit_cache_correction
from errata.compress.cache.cache_features import input_scales
from errata.compress.quantize.simulation import simulate
from errata.runtime.denoiser import UNetDenoiser
from errata.runtime.feature_correction import FeatureCorrection, correct_outputs
from errata.runtime.scheme import CacheCorrection, Scheme
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

SCHEDULE = CacheSchedule(num_steps=6, full_steps=(0, 3), branch=3)
CACHED = (1, 2, 4, 5)
PLAIN = CacheQuant(interval=3, gain="least_squares")
REFINED = CacheQuant(interval=3, gain="least_squares", corrected_by="iec")
SPREAD = CacheQuant(interval=3)


@dataclasses.dataclass
class Case:
    """A scheme with its table, and what is fitted on it."""

    unet: Any
    calibration_set: CalibrationSet
    scheme: Scheme
    table: dict[str, Tensor]
    schedule: CacheSchedule = SCHEDULE

    def fit(self, cache: CacheQuant = PLAIN, *, samples: int = 64) -> dict[str, Tensor]:
        return fit_cache_correction(
            self.unet, self.calibration_set, self.scheme, self.table, self.schedule, cache, samples=samples
        )

    def simulated(self, additions: dict[str, Tensor] | None = None) -> tuple[UNetDenoiser, nn.Module]:
        """The simulation; uncorrected without additions."""
        context = StepContext()
        scheme = self.scheme if additions else dataclasses.replace(self.scheme, correction=None)
        table = self.table | (additions or {})
        unet = simulate(self.unet, scheme, table, context)
        correct_outputs(unet, scheme, table, context=context)
        times = tuple(float(time) for time in self.calibration_set.timesteps)
        correction = FeatureCorrection.of(scheme, table)
        return UNetDenoiser(BranchedUNet(unet), context, self.schedule, times, correction=correction), unet

    @torch.no_grad()
    def float_feature(self, step: int) -> Tensor:
        time = float(self.calibration_set.timesteps[step])
        feature = BranchedUNet(self.unet).full(self.sample(step), time, {}, branch=self.schedule.branch)[1]
        assert feature is not None
        return feature

    def sample(self, step: int) -> Tensor:
        return torch.cat([record.sample for record in self.calibration_set.batches(step)])


@pytest.fixture(scope="module")
def quantized(
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    tiny_compressed: Callable[[str], CompressedPipeline],
) -> Case:
    scheme = Scheme.of(tiny_pipeline.unet, Recipe.named("w4a8+cachequant-3"), branch=3)
    table = dict(tiny_compressed("w4a8").compression.table)
    return Case(tiny_pipeline.unet, tiny_calibration, scheme, table)


@pytest.fixture(scope="module")
def cache_only(tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet) -> Case:
    scheme = Scheme.of(tiny_pipeline.unet, Recipe.named("cachequant-3"), branch=3)
    return Case(tiny_pipeline.unet, tiny_calibration, scheme, {})


@pytest.fixture(scope="module")
def additions(quantized: Case) -> dict[str, Tensor]:
    return quantized.fit()


def line(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and shift of every channel by a general least squares solver, in float64."""
    x, y = (value.movedim(1, 0).flatten(1).double() for value in (source, target))
    design = torch.stack([x, torch.ones_like(x)], dim=2)
    solution = torch.linalg.lstsq(design, y[:, :, None]).solution[:, :, 0]
    return solution[:, 0].float(), solution[:, 1].float()


@contextmanager
def outputs(unet: Any, name: str) -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []
    handle = unet.get_submodule(name).register_forward_hook(lambda module, inputs, out: kept.append(out))
    yield kept
    handle.remove()


def test_names_and_shapes_are_those_of_the_scheme(additions: dict[str, Tensor], quantized: Case) -> None:
    assert quantized.scheme.correction is not None
    readers = [layer.name for layer in quantized.scheme.correction.layers]
    assert readers == ["up_blocks.1.resnets.0.conv1", "up_blocks.1.resnets.0.conv_shortcut"]
    outputs = {f"{name}.output_{kind}" for name in readers for kind in ("gain", "shift")}
    assert set(additions) == {"cache.gain", "cache.shift"} | outputs
    for value in additions.values():
        assert value.shape == (6, 16)
        assert value.dtype == torch.float32


def test_full_steps_are_left_as_they_are(additions: dict[str, Tensor]) -> None:
    for name, value in additions.items():
        identity = 1.0 if name.endswith("gain") else 0.0
        for step in SCHEDULE.full_steps:
            assert (value[step] == identity).all()
        for step in CACHED:
            assert not (value[step] == identity).any()


@pytest.mark.parametrize("cache", [PLAIN, REFINED], ids=["plain", "iec"])
@torch.no_grad()
def test_it_equals_a_slow_computation_with_everything_in_memory(quantized: Case, cache: CacheQuant) -> None:
    found = quantized.fit(cache)
    denoiser, simulated = quantized.simulated()
    feature_correction = FeatureCorrection(found["cache.gain"], found["cache.shift"])
    for start, end in SCHEDULE.groups:
        x = quantized.sample(start if cache is PLAIN else start + 1)  # DDIM does not scale its input
        stored = denoiser.full(x, start, {})[1]
        assert stored is not None
        for step in range(start + 1, end):
            gain, shift = line(stored, quantized.float_feature(step))
            torch.testing.assert_close(found["cache.gain"][step], gain, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found["cache.shift"][step], shift, rtol=1e-4, atol=1e-5)
            for name in ("up_blocks.1.resnets.0.conv1", "up_blocks.1.resnets.0.conv_shortcut"):
                x, corrected = quantized.sample(step), feature_correction(stored, step)
                time = float(quantized.calibration_set.timesteps[step])
                with outputs(quantized.unet, name) as wanted, outputs(simulated, name) as have:
                    BranchedUNet(quantized.unet).cached(x, time, {}, corrected, branch=3)
                    denoiser.cached(x, step, {}, corrected)
                gain, shift = line(*have, *wanted)
                torch.testing.assert_close(found[f"{name}.output_gain"][step], gain, rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(found[f"{name}.output_shift"][step], shift, rtol=1e-3, atol=1e-4)


def test_what_iec_leaves_gives_another_correction(quantized: Case, additions: dict[str, Tensor]) -> None:
    refined = quantized.fit(REFINED)
    for step in CACHED:
        assert (refined["cache.gain"][step] - additions["cache.gain"][step]).abs().max() > 1e-3
    assert (refined["cache.gain"][[0, 3]] == 1).all()


class StillSet:
    """One recorded input that stays the same at every step, so the float feature does too."""

    num_steps, rows_per_sample, num_samples, calls_per_step = 4, 1, 3, 1
    timesteps = (500, 500, 500, 500)

    def batches(self, step: int, *, limit: int, batch_size: int | None = None) -> Iterator[Record]:
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(3, 1, 8, 8, generator=generator)[:limit]
        for rows in sample.split(batch_size or len(sample)):
            yield Record(sample=rows, timestep=torch.tensor(500), cond={}, step=step)


def test_a_cached_feature_that_is_affine_in_the_wanted_one_is_corrected_exactly(
    tiny_pipeline: DDIMPipeline,
) -> None:
    """The compressed model's feature is (F - b) / a by construction, so a and b must come back."""
    gain, shift = torch.linspace(0.5, 2, 16), torch.linspace(-3, 3, 16)
    last = "up_blocks.1.resnets.1"  # what it returns is the feature of branch 1
    parameters = dict(tiny_pipeline.unet.named_parameters())
    table = {
        f"{last}.{name}": parameters[f"{last}.{name}"] / gain[:, None, None, None]
        for name in ("conv2.weight", "conv_shortcut.weight")
    }
    table[f"{last}.conv2.bias"] = (parameters[f"{last}.conv2.bias"] - shift) / gain
    table[f"{last}.conv_shortcut.bias"] = parameters[f"{last}.conv_shortcut.bias"] / gain
    schedule = CacheSchedule(num_steps=4, full_steps=(0, 2), branch=1)
    scheme = Scheme(correction=CacheCorrection(feature_channels=16))
    still: Any = StillSet()
    found = fit_cache_correction(tiny_pipeline.unet, still, scheme, table, schedule, CacheQuant(interval=2))
    assert set(found) == {"cache.gain", "cache.shift"}
    for step in (1, 3):
        torch.testing.assert_close(found["cache.gain"][step], gain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["cache.shift"][step], shift, rtol=1e-4, atol=1e-4)


def test_without_quantization_and_without_change_there_is_nothing_to_correct(
    tiny_pipeline: DDIMPipeline,
) -> None:
    schedule = CacheSchedule(num_steps=4, full_steps=(0,), branch=1)
    still: Any = StillSet()
    scheme = Scheme(correction=CacheCorrection(feature_channels=16))
    found = fit_cache_correction(tiny_pipeline.unet, still, scheme, {}, schedule, CacheQuant(interval=4))
    torch.testing.assert_close(found["cache.gain"], torch.ones(4, 16), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["cache.shift"], torch.zeros(4, 16), rtol=0, atol=1e-6)


def test_the_float_model_is_corrected_too(cache_only: Case) -> None:
    found = cache_only.fit()
    assert set(found) == {"cache.gain", "cache.shift"}
    assert errors(cache_only, found, rows=slice(0, 8)) < 0.9 * errors(cache_only, None, rows=slice(0, 8))


@torch.no_grad()
def errors(case: Case, found: dict[str, Tensor] | None, *, rows: slice) -> float:
    """Mean squared error of the feature that cached steps read, over some of the recorded samples."""
    denoiser, _ = case.simulated()
    total = 0.0
    for start, end in SCHEDULE.groups:
        stored = denoiser.full(case.sample(start)[rows], start, {})[1]
        assert stored is not None
        for step in range(start + 1, end):
            read = stored
            if found is not None:
                read = FeatureCorrection(found["cache.gain"], found["cache.shift"])(stored, step)
            total += float(functional.mse_loss(read, case.float_feature(step)[rows]))
    return total


def test_it_reduces_the_error_on_samples_that_it_has_not_seen(quantized: Case) -> None:
    found = quantized.fit(samples=4)
    held_out = slice(4, 8)
    assert errors(quantized, found, rows=held_out) < 0.9 * errors(quantized, None, rows=held_out)


def test_the_gain_of_the_recipe_decides(quantized: Case, additions: dict[str, Tensor]) -> None:
    """Least squares shrinks the feature; the spread of the full passes' features is kept otherwise."""
    spread = quantized.fit(SPREAD)
    for step in CACHED:
        assert spread["cache.gain"][step].mean() > additions["cache.gain"][step].mean() + 1e-3


@torch.no_grad()
def test_it_brings_cached_passes_nearer_to_those_of_the_float_model(
    quantized: Case, additions: dict[str, Tensor]
) -> None:
    reader, float_model = "up_blocks.1.resnets.0.conv1", BranchedUNet(quantized.unet)
    feature = FeatureCorrection(additions["cache.gain"], additions["cache.shift"])
    feature_only = {
        name: torch.full_like(value, float(name.endswith("gain"))) if "output" in name else value
        for name, value in additions.items()
    }

    def reader_error(found: dict[str, Tensor]) -> float:
        """Of the reader's output against the float model's from the same corrected feature."""
        denoiser, simulated = quantized.simulated(found)
        total = 0.0
        for start, end in SCHEDULE.groups:
            stored = denoiser.full(quantized.sample(start), start, {})[1]
            assert stored is not None
            for step in range(start + 1, end):
                x, time = quantized.sample(step), float(quantized.calibration_set.timesteps[step])
                with outputs(quantized.unet, reader) as wanted, outputs(simulated, reader) as have:
                    float_model.cached(x, time, {}, feature(stored, step), branch=3)
                    denoiser.cached(x, step, {}, stored)
                total += float(functional.mse_loss(have[0], wanted[0]))
        return total

    assert reader_error(additions) < reader_error(feature_only)  # what least squares promises


@torch.no_grad()
def test_predictions_of_cached_passes_come_nearer_to_full_ones(
    quantized: Case, additions: dict[str, Tensor]
) -> None:
    def error(found: dict[str, Tensor] | None) -> float:
        denoiser, _ = quantized.simulated(found)
        float_model = BranchedUNet(quantized.unet)
        total = 0.0
        for start, end in SCHEDULE.groups:
            stored = denoiser.full(quantized.sample(start), start, {})[1]
            assert stored is not None
            for step in range(start + 1, end):
                x, time = quantized.sample(step), float(quantized.calibration_set.timesteps[step])
                wanted = float_model.full(x, time, {}, branch=0)[0]
                total += float(functional.mse_loss(denoiser.cached(x, step, {}, stored), wanted))
        return total

    assert error(additions) < error(None)


def test_the_result_does_not_depend_on_how_samples_are_grouped(
    quantized: Case, additions: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_features, "_LARGEST_CHUNK", 1)
    for name, value in quantized.fit().items():
        torch.testing.assert_close(value, additions[name], rtol=1e-3, atol=1e-4)


def test_nothing_is_fitted_without_a_correction_and_everything_is_full_without_cached_steps(
    quantized: Case,
) -> None:
    assert dataclasses.replace(quantized, scheme=Scheme()).fit() == {}
    every = CacheSchedule(num_steps=6, full_steps=tuple(range(6)), branch=3)
    for name, value in dataclasses.replace(quantized, schedule=every).fit(REFINED).items():
        assert (value == (1.0 if name.endswith("gain") else 0.0)).all()


def test_the_float_network_is_left_alone(quantized: Case) -> None:
    before = {name: value.clone() for name, value in quantized.unet.state_dict().items()}
    quantized.fit(samples=1)
    after = quantized.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in quantized.unet.modules())


def test_full_passes_of_the_model_are_those_without_a_correction(
    quantized: Case, additions: dict[str, Tensor]
) -> None:
    corrected, _ = quantized.simulated(additions)
    plain, _ = quantized.simulated()
    for step in range(6):
        x = quantized.sample(step)
        for found, expected in zip(corrected.full(x, step, {}), plain.full(x, step, {}), strict=True):
            assert found is not None
            assert expected is not None
            assert torch.equal(found, expected)
        feature = plain.full(x, step, {})[1]
        assert feature is not None
        before = feature.clone()
        is_same = torch.equal(corrected.cached(x, step, {}, feature), plain.cached(x, step, {}, feature))
        assert is_same == (step in SCHEDULE.full_steps)
        assert torch.equal(feature, before)  # what is stored is untouched


class RandomSet(StillSet):
    """Three recorded samples of a network, other ones at every step, with guidance: two rows for each."""

    rows_per_sample, cond_names = 2, ()
    scheduler_class, num_inference_steps = "EulerDiscreteScheduler", 4

    def __init__(self, case: Any) -> None:
        self._case = case
        scheduler = EulerDiscreteScheduler()
        scheduler.set_timesteps(4)
        self.scheduler_config = dict(scheduler.config)
        self.timesteps = tuple(float(time) for time in scheduler.timesteps)  # type: ignore[assignment]
        self.sample_shape = tuple(case.x.shape[1:])
        latent = torch.randn(4, 6, *self.sample_shape).cumsum(0)
        fixed = case.unet.config.out_channels
        latent[:, :, fixed:] = latent[:1, :, fixed:]  # a concatenated condition does not move
        self._samples = latent

    def batches(self, step: int, *, limit: int, batch_size: int | None = None) -> Iterator[Record]:
        for first in range(0, min(3, limit), batch_size or 3):
            last = min(first + (batch_size or 3), 3, limit)
            rows = [kind * 3 + sample for kind in range(2) for sample in range(first, last)]
            repeated = {
                name: value[:1].expand(len(rows), *value.shape[1:]) if value.ndim else value
                for name, value in self._case.cond.items()
            }
            time = torch.tensor(self.timesteps[step])
            yield Record(sample=self._samples[step, rows], timestep=time, cond=repeated, step=step)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers 0.42 under NumPy 2
@pytest.mark.parametrize("name", ["pixel", "sd", "sdxl", "upscaler", "audioldm2"])
@torch.no_grad()
def test_other_networks_with_guidance_and_a_scheduler_that_scales(
    name: str, network: Callable[[str], Any]
) -> None:
    case = network(name)
    recorded: Any = RandomSet(case)
    branch, schedule = 2, CacheSchedule(num_steps=4, full_steps=(0, 2), branch=2)
    scheme = Scheme.of(case.unet, Recipe.named("cachequant-2:branch=2"), branch=branch)
    assert scheme.correction is not None
    cache = CacheQuant(interval=2, gain="least_squares", corrected_by="iec")
    found = fit_cache_correction(case.unet, recorded, scheme, {}, schedule, cache)
    model, ratios = BranchedUNet(case.unet), input_scales(recorded)
    (record,), (following,) = (list(recorded.batches(step, limit=3)) for step in (2, 3))
    x, latent = following.sample.clone(), case.unet.config.out_channels
    x[:, :latent] *= ratios[2] / ratios[3]
    stored = model.full(x, recorded.timesteps[2], record.cond, branch=branch)[1]
    wanted = model.full(following.sample, recorded.timesteps[3], following.cond, branch=branch)[1]
    assert stored is not None
    assert wanted is not None
    gain, shift = line(stored, wanted)
    torch.testing.assert_close(found["cache.gain"][3], gain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["cache.shift"][3], shift, rtol=1e-3, atol=1e-4)
