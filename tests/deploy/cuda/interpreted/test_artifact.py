"""A whole artifact on the Triton kernels against the reference backend."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from plain_outputs import plain_outputs

from errata import calibration, compress, deploy
from errata.calibration import CalibrationSet
from errata.deploy.cuda import CudaLayer

LAST = 3  # of four steps; `deepcache-2` takes it from the cache


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> tuple[DDIMPipeline, CalibrationSet]:
    """A pipeline that is `tiny_pipeline` with fewer layers of each kind, and its trajectories."""
    torch.manual_seed(1234)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
    ).eval()
    with torch.no_grad():
        unet.conv_out.weight /= unet(torch.randn(64, 1, 8, 8), 500).sample.square().mean().sqrt()
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    out = tmp_path_factory.mktemp("calibration") / "set"
    return pipe, calibration.collect(pipe, out, num_inference_steps=LAST + 1, num_samples=4, batch_size=4)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8+deepcache-2:branch=1"])
def test_an_artifact_agrees_with_the_reference_within_rounding_flips(
    recipe: str, trajectories: tuple[DDIMPipeline, CalibrationSet], tmp_path: Path
) -> None:
    pipe, recording = trajectories
    with plain_outputs():
        compressed = compress.apply(pipe, recording, recipe, tmp_path / "out")
    path = deploy.export(compressed, tmp_path / "artifact")
    reference, int8 = (deploy.load(path, device="cpu", backend=name) for name in ("reference", "triton"))
    rows = [row for row in int8.backend_report() if row.scheme in ("w8a8", "w4a8")]
    assert {row.backend for row in rows} == {"triton"}
    assert len([part for part in int8.pipe.unet.module.modules() if isinstance(part, CudaLayer)]) == len(rows)
    x = next(recording.batches(LAST)).sample[:1]
    expected, _ = reference.denoiser.full(x, LAST, {})
    found, feature = int8.denoiser.full(x, LAST, {})
    # Codes on a tie may round either way; later layers amplify that.
    assert rms(found - expected) <= 0.015 * rms(expected)
    if feature is not None:
        cached = int8.denoiser.cached(x, LAST, {}, feature)
        assert rms(cached - found) <= 0.015 * rms(expected)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
