import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from safetensors.torch import load_file

from errata import compress, correct, deploy
from errata.calibration import CalibrationSet
from errata.compress import CompressedPipeline, Recipe
from errata.deploy import DeployedPipeline
from errata.deploy.cpu import int8
from errata.deploy.tensors import expected_tensors
from errata.runtime.feature_correction import CorrectedOutput
from errata.runtime.recipes.caching import CacheQuant
from errata.runtime.scheme import Scheme

Make = Callable[[str], CompressedPipeline]
Artifact = Callable[[str], Path]
RECIPES = ["w8a8+cachequant-3", "w4a8+cachequant-3:branch=1,corrected_by=iec", "cachequant-3"]
BOTH_PARTS = RECIPES[:2]
# Relative RMS of a prediction to the reference's, as for other recipes (test_deployed).
INT8_BOUND = 0.015


def images(pipeline: DeployedPipeline | CompressedPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.as_tensor(pipeline(batch_size=4, generator=generator, output_type="np").images)


def pairs_of_calls(
    found: DeployedPipeline, expected: CompressedPipeline, calibration_set: CalibrationSet
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Full and cached predictions of both at every step; cached ones read the same feature."""
    pairs = []
    for step in range(calibration_set.num_steps):
        x = next(calibration_set.batches(step)).sample
        wanted, feature = expected.denoiser.full(x, step, {})
        assert feature is not None
        pairs.append((found.denoiser.full(x, step, {})[0], wanted))
        calls = (found.denoiser.cached(x, step, {}, feature), expected.denoiser.cached(x, step, {}, feature))
        pairs.append(calls)
    return pairs


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_reference_backend_is_the_simulation_bit_for_bit(
    recipe: str, tiny_compressed: Make, tiny_artifact: Artifact, tiny_calibration: CalibrationSet
) -> None:
    compressed, deployed = tiny_compressed(recipe), deploy.load(tiny_artifact(recipe), backend="reference")
    for found, expected in pairs_of_calls(deployed, compressed, tiny_calibration):
        assert torch.equal(found, expected)
    assert torch.equal(images(deployed), images(compressed))


@pytest.mark.skipif(not int8.is_available(), reason="this CPU has no VNNI instructions")
@pytest.mark.parametrize("recipe", BOTH_PARTS)
def test_int8_kernels_are_corrected_alike(
    recipe: str, tiny_compressed: Make, tiny_artifact: Artifact, tiny_calibration: CalibrationSet
) -> None:
    compressed, deployed = tiny_compressed(recipe), deploy.load(tiny_artifact(recipe), backend="onednn")
    for found, expected in pairs_of_calls(deployed, compressed, tiny_calibration):
        error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error <= INT8_BOUND


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_artifact_holds_and_uses_its_correction(
    backend: str, tiny_compressed: Make, tiny_artifact: Artifact
) -> None:
    recipe = BOTH_PARTS[0]
    compression = tiny_compressed(recipe).compression
    correction = compression.scheme.correction
    assert correction is not None
    stored = load_file(tiny_artifact(recipe) / "unet" / "errata.safetensors")
    names = {"cache.gain", "cache.shift"}
    names |= {f"{layer.name}.output_{kind}" for layer in correction.layers for kind in ("gain", "shift")}
    for name in names:
        assert torch.equal(stored[name], compression.table[name])
    deployed = deploy.load(tiny_artifact(recipe), backend=backend)
    module = deployed.pipe.unet.module.unet
    wrapped = [name for name, layer in module.named_modules() if isinstance(layer, CorrectedOutput)]
    assert wrapped == [layer.name for layer in correction.layers]
    told = {row.layer for row in deployed.backend_report() if "output corrected in cached" in row.reason}
    assert told == set(wrapped)


def test_learned_rounding_has_no_output_correction(tiny_pipeline: DDIMPipeline) -> None:
    scheme = Scheme.of(tiny_pipeline.unet, Recipe.named("w4a8-learned+cachequant-3"), branch=3)
    expected = expected_tensors(tiny_pipeline.unet, scheme, num_steps=6)
    assert expected["cache.gain"] == expected["cache.shift"] == (torch.float32, (6, 16))
    assert not any("output_gain" in name for name in expected)


def test_biases_are_corrected_before_the_cache_is(tiny_compressed: Make) -> None:
    compression = tiny_compressed("w4a8+cachequant-3:bias_correction=true").compression
    assert any(name.endswith("conv1.bias") for name in compression.table)
    assert any(name.endswith("output_gain") for name in compression.table)


@pytest.mark.parametrize("recipe", BOTH_PARTS)
def test_schedule_and_numbers_survive_the_disk(recipe: str, tiny_compressed: Make) -> None:
    compressed = tiny_compressed(recipe)
    cache = compressed.compression.recipe.cache
    assert isinstance(cache, CacheQuant)
    assert cache.allows(compressed.compression.schedule)
    again = compress.load(compressed.path)
    assert again.compression.schedule == compressed.compression.schedule
    assert torch.equal(images(again), images(compressed))


def test_refinement_of_full_steps_runs_on_a_corrected_cache(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact(RECIPES[1]), backend="reference")
    found = [images(deployed)]
    for cache_after in ("replace", "keep"):
        refined = correct.wrap(deployed, correct.Plan(correct.IEC(cache_after=cache_after), steps="full"))
        sampled = refined(batch_size=4, generator=torch.Generator().manual_seed(3), output_type="np").images
        found.append(torch.as_tensor(sampled))
        assert refined.stats.extra == {"full": float(len(deployed.schedule.full_steps))}
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 1e-3
