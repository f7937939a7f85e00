from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from safetensors import safe_open

from errata import calibration, compress, large_weights
from errata.calibration import load_pipeline, model_fingerprint
from errata.large_weights import stored_weights


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_weights, "LARGE", 1000)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "float32")
    DDPMPipeline(unet.half(), DDIMScheduler()).save_pretrained(tmp_path / "float16")
    # The same values as the second, in the type of the first.
    DDPMPipeline(unet.float(), DDIMScheduler()).save_pretrained(tmp_path / "rounded")
    return tmp_path


def test_half_precision_stays_half_and_computes_in_float32(saved: Path) -> None:
    half, rounded = load_pipeline(saved / "float16").unet, load_pipeline(saved / "rounded").unet
    assert half.dtype == torch.float32
    assert {value.dtype for value in stored_weights(half).values()} == {torch.float16}
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(half(x, 5)[0], rounded(x, 5)[0])
    assert model_fingerprint(half) == model_fingerprint(rounded)
    assert model_fingerprint(half) != model_fingerprint(load_pipeline(saved / "float32").unet)


def test_float32_is_opened_as_it_is(saved: Path) -> None:
    assert not stored_weights(load_pipeline(saved / "float32").unet)


def test_a_half_precision_pipeline_is_compressed_as_its_float32_form(saved: Path) -> None:
    half, rounded = load_pipeline(saved / "float16"), load_pipeline(saved / "rounded")
    recipe = compress.Recipe(
        quantization=compress.Quantization(
            weight_bits=4,
            activation_bits=8,
            rounding=compress.LearnedRounding(iterations=3, samples=4, batch_size=2),
            bias_correction=True,
            equalization=True,
        )
    )
    tables = []
    for name, pipe in (("half", half), ("rounded", rounded)):
        before = model_fingerprint(pipe.unet)
        recorded = calibration.calibrate(
            pipe, saved / f"{name}-recorded", num_inference_steps=2, num_samples=4, batch_size=4
        )
        compressed = compress.compress(pipe, recorded, recipe, saved / f"{name}-compressed")
        assert model_fingerprint(pipe.unet) == before
        tables.append(compressed.compression.table)
    assert tables[0].keys() == tables[1].keys()
    assert all(torch.equal(value, tables[1][name]) for name, value in tables[0].items())

    folder = saved / "half-compressed" / "pipeline" / "unet"
    with safe_open(folder / "diffusion_pytorch_model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118
    reopened = compress.load(saved / "half-compressed")
    assert {value.dtype for value in stored_weights(reopened.float_pipe.unet).values()} == {torch.float16}


def test_a_pipeline_that_was_half_in_memory_is_half_when_its_result_is_opened(saved: Path) -> None:
    pipe = load_pipeline(saved / "rounded")
    pipe.unet.half()
    recorded = calibration.calibrate(
        pipe, saved / "recorded", num_inference_steps=2, num_samples=4, batch_size=4
    )
    compress.compress(pipe, recorded, "w8a8:calibrated_output=false", saved / "compressed")
    unet = compress.load(saved / "compressed").float_pipe.unet
    assert {value.dtype for value in unet.parameters()} == {torch.float16}


def test_a_hub_pipeline_stays_half_too(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: str(saved / "float16"))
    unet = load_pipeline("some/pipeline").unet
    assert {value.dtype for value in stored_weights(unet).values()} == {torch.float16}
    assert model_fingerprint(unet) == model_fingerprint(load_pipeline(saved / "float16").unet)
