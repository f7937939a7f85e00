"""Calibrated output: what is fitted, and that only what helps images is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from errata import calibration, compress
from errata.calibration import CalibrationSet
from errata.calibration.arguments import PipelineArguments
from errata.compress import CompressedPipeline
from errata.compress.jobs import work
from errata.compress.jobs.image_judge import HeldOutImages
from errata.compress.quantize.calibrated_output import fit_output_map, identity_map
from errata.errors import RecipeError
from errata.journal import without_journal
from errata.quality.paired import psnr
from errata.runtime.output_map import OUTPUT_MAP
from errata.runtime.output_moments import OutputMoments

Make = Callable[[str], CompressedPipeline]
MATRIX, BIAS = OUTPUT_MAP
STEPS = 5


@pytest.fixture(scope="module")
def recorded(digits: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    out = tmp_path_factory.mktemp("digits") / "set"
    return calibration.calibrate(digits, out, num_inference_steps=STEPS, num_samples=16, batch_size=16)


@pytest.fixture(scope="module")
def calibrated(
    digits: DDIMPipeline, recorded: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> CompressedPipeline:
    return compress.compress(digits, recorded, "w4a8", tmp_path_factory.mktemp("w4a8") / "c")


def fitted(compressed: CompressedPipeline, recorded: CalibrationSet, **changes: Tensor) -> dict[str, Tensor]:
    compression = compressed.compression
    return fit_output_map(
        compressed.float_pipe.unet,
        recorded,
        compression.scheme,
        {**compression.table, **changes},
        stage=without_journal,
    )


def test_each_call_is_fitted_to_its_own_full_evaluations(
    tiny_compressed: Make, tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet
) -> None:
    compressed = tiny_compressed("w4a8:calibrated_output=false")
    scheme = tiny_compressed("w4a8").compression.scheme
    found = fit_output_map(
        tiny_pipeline.unet, tiny_calibration, scheme, compressed.compression.table, stage=without_journal
    )
    for step in range(tiny_calibration.num_steps):
        moments = OutputMoments(1, 1)
        for number, record in enumerate(tiny_calibration.batches(step, batch_size=4)):
            prediction, _ = compressed.denoiser.full(record.sample, step, {})
            with torch.no_grad():
                right = tiny_pipeline.unet(record.sample, record.timestep).sample
            moments.add(0, prediction, right, torch.arange(4) + 4 * number)
        matrix, bias = moments.map_of(0)
        assert torch.allclose(found[MATRIX][step], matrix, atol=1e-3)
        assert torch.allclose(found[BIAS][step], bias, atol=1e-3)
    assert float((found[MATRIX] - 1).abs().max()) > 10 * 1e-3
    assert float(found[BIAS].abs().max()) > 10 * 1e-3


def test_an_offset_of_the_network_is_found(calibrated: CompressedPipeline, recorded: CalibrationSet) -> None:
    """What the last layer adds too much, the bias of the map takes away."""
    bias = calibrated.float_pipe.unet.conv_out.bias.detach()
    before, after = (
        fitted(calibrated, recorded, **{"conv_out.bias": bias + more})[BIAS] for more in (0.0, 0.5)
    )
    moved = (before - after) / 0.5
    # The matrix is not the identity, so the map takes away a little more or less than was added.
    assert torch.allclose(moved, torch.ones_like(moved), atol=0.05)


def test_images_of_fresh_noise_get_nearer(
    calibrated: CompressedPipeline, digits: DDIMPipeline, recorded: CalibrationSet, tmp_path: Path
) -> None:
    told = calibrated.compression.calibrated_output
    assert told is not None
    assert told.images == 16
    assert told.helps
    plain = compress.compress(digits, recorded, "w4a8:calibrated_output=false", tmp_path / "plain")
    assert plain.compression.scheme.output is None
    assert not set(OUTPUT_MAP) & set(plain.compression.table)

    def images(pipe: Any) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(900, 916)]
        output = pipe(batch_size=16, generator=generators, num_inference_steps=STEPS, output_type="np").images
        return torch.from_numpy(output).permute(0, 3, 1, 2)

    right = images(digits)
    gain = float((psnr(images(calibrated), right) - psnr(images(plain), right)).mean())
    assert gain > 1
    assert gain == pytest.approx(told.change, abs=2)


def test_what_harms_images_is_left_out(
    digits: DDIMPipeline, recorded: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmful(*arguments: object, **options: object) -> dict[str, Tensor]:
        numbers = identity_map(STEPS, 1)
        numbers[BIAS] += 0.2
        return numbers

    monkeypatch.setattr(work, "fit_output_map", harmful)
    compressed = compress.compress(digits, recorded, "w8a8", tmp_path / "out")
    told = compressed.compression.calibrated_output
    assert told is not None
    assert told.change < -3
    for name, value in identity_map(STEPS, 1).items():
        assert torch.equal(compressed.compression.table[name], value)
    assert compress.load(tmp_path / "out").compression.calibrated_output == told


def test_without_arguments_to_sample_with_nothing_is_changed_and_that_is_said(
    digits: DDIMPipeline,
    recorded: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(CalibrationSet, "arguments", lambda self, inputs: None)
    compressed = compress.compress(digits, recorded, "w8a8", tmp_path / "out")
    assert compressed.compression.calibrated_output is None
    for name, value in identity_map(STEPS, 1).items():
        assert torch.equal(compressed.compression.table[name], value)
    assert "the output is not calibrated" in caplog.text
    assert "errata sheet" in caplog.text


def test_a_cache_alone_has_nothing_to_calibrate(tiny_compressed: Make) -> None:
    for name in ("deepcache-3", "deepcache-3:calibrated_output=false"):
        compression = tiny_compressed(name).compression
        assert compression.scheme.output is None
        assert compression.calibrated_output is None


def test_too_few_trajectories_leave_the_network_alone(digits: DDIMPipeline, tmp_path: Path) -> None:
    few = calibration.calibrate(digits, tmp_path / "set", num_inference_steps=2, num_samples=3, batch_size=3)
    compressed = compress.compress(digits, few, "w8a8", tmp_path / "out")
    assert compressed.compression.calibrated_output is None
    for name, value in identity_map(2, 1).items():
        assert torch.equal(compressed.compression.table[name], value)


def test_held_out_noise_is_not_that_of_the_recording(
    digits: DDIMPipeline, recorded: CalibrationSet, calibrated: CompressedPipeline
) -> None:
    seen: list[Tensor] = []
    handle = digits.unet.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named.get("sample", arguments[0])), with_kwargs=True
    )
    try:
        assert HeldOutImages(digits, recorded, recorded.arguments(), stage=without_journal).right
    finally:
        handle.remove()
    assert len(seen) == STEPS
    assert seen[0].shape == (16, 1, 16, 16)
    noise = torch.cat([record.sample for record in recorded.batches(0)])
    distances = torch.cdist(seen[0].flatten(1), noise.flatten(1))
    assert float(distances.min()) > 10


def test_prompts_of_the_recording_are_used(
    digits: DDIMPipeline, recorded: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen at most, in batches, each with its own."""
    told: list[dict[str, Any]] = []
    prompts = tuple(f"text {number}" for number in range(16))
    monkeypatch.setattr("errata.compress.jobs.image_judge.check_pipeline", lambda *a, **k: None)

    def note(pipe: Any, **given: Any) -> Any:
        told.append(given)
        raise RecipeError("enough")

    monkeypatch.setattr("errata.compress.jobs.image_judge.run_batch", note)
    with pytest.raises(RecipeError, match="enough"):
        assert HeldOutImages(
            digits, recorded, PipelineArguments(prompts=prompts), stage=without_journal
        ).right
    assert told[0]["prompts"] == list(prompts)
    assert len(told[0]["seeds"]) == 16
    assert told[0]["guidance_scale"] is recorded.guidance_scale
