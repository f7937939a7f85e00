"""How many samples, in which batches, where nobody says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DConditionModel, UNet2DModel

from errata import CalibrationError, calibration
from errata.calibration.sizes import choose_sizes
from errata.embedded import PIPELINE


def chosen(unet: torch.nn.Module, **options: Any) -> tuple[int, int]:
    sizes = choose_sizes(unet, **{"num_samples": None, "batch_size": None} | options)
    return sizes.num_samples, sizes.batch_size


@pytest.fixture(scope="module")
def stable_diffusion() -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5, without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


def test_small_networks_keep_512_samples_in_batches_of_64(tiny_pipeline: DDIMPipeline) -> None:
    assert chosen(tiny_pipeline.unet) == (512, 64)
    assert chosen(calibration.load_pipeline(PIPELINE).unet) == (512, 64)
    with torch.device("meta"):  # google/ddpm-cifar10-32
        cifar = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    assert chosen(cifar) == (512, 64)


def test_a_network_that_states_no_size_counts_as_small() -> None:
    assert chosen(torch.nn.Linear(4, 4)) == (512, 64)


def test_large_networks_get_fewer(stable_diffusion: UNet2DConditionModel) -> None:
    assert chosen(stable_diffusion) == (16, 4)
    sizes = choose_sizes(stable_diffusion, num_samples=None, batch_size=None)
    assert sizes.reason == "chosen for a network of 860 M parameters at 64×64"


def test_a_preset_takes_less_and_says_so(
    stable_diffusion: UNet2DConditionModel, tiny_pipeline: DDIMPipeline
) -> None:
    assert chosen(stable_diffusion, preset="laptop") == (8, 1)
    assert chosen(tiny_pipeline.unet, preset="laptop") == (64, 8)
    sizes = choose_sizes(stable_diffusion, num_samples=None, batch_size=None, preset="laptop")
    assert sizes.reason.endswith("with the preset laptop")


def test_explicit_numbers_win(stable_diffusion: UNet2DConditionModel) -> None:
    assert chosen(stable_diffusion, num_samples=100, preset="laptop") == (100, 1)
    assert chosen(stable_diffusion, batch_size=32, preset="laptop") == (8, 32)
    sizes = choose_sizes(stable_diffusion, num_samples=3, batch_size=2, preset="laptop")
    assert (sizes.num_samples, sizes.batch_size, sizes.reason) == (3, 2, "")


def test_an_unknown_preset_is_refused_even_where_it_would_change_nothing(tiny_pipeline: DDIMPipeline) -> None:
    with pytest.raises(CalibrationError, match="unknown preset 'desk'"):
        choose_sizes(tiny_pipeline.unet, num_samples=3, batch_size=2, preset="desk")


def test_unfinished_work_is_continued_with_its_own_numbers(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    calls = iter(range(3))

    def stops_in_the_second_batch(*_: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    handle = tiny_pipeline.unet.register_forward_pre_hook(stops_in_the_second_batch)
    try:
        with pytest.raises(KeyboardInterrupt):
            calibration.calibrate(tiny_pipeline, out, num_inference_steps=2, num_samples=5, batch_size=2)
    finally:
        handle.remove()
    sizes = choose_sizes(tiny_pipeline.unet, num_samples=None, batch_size=None, out=out)
    assert (sizes.num_samples, sizes.batch_size) == (5, 2)
    assert sizes.reason == "as the unfinished work has them"
    recorded = calibration.calibrate(tiny_pipeline, out, num_inference_steps=2)
    assert (recorded.num_samples, recorded.batch_size) == (5, 2)
