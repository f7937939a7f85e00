"""Scales that differ more than fourfold between steps, and full passes at steps that the cache skips."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor

from errata import compress, deploy
from errata.calibration import CalibrationSet
from errata.calibration.calibration_set import Record
from errata.compress import CompressedPipeline
from errata.runtime.scheme import sites_of
from errata.runtime.unet import BranchedUNet

# By these the recorded samples are multiplied. Full steps are 0 and 3; cached ones read their features.
FACTORS = (1.0, 8.0, 64.0, 1.0, 64.0, 8.0)
FULL, CACHED = (0, 3), (1, 2, 4, 5)
# What a cached step of branch 3 does not compute.
SKIPPED = ("down_blocks.0.downsamplers", "down_blocks.1", "mid_block", "up_blocks.0")


@pytest.fixture(scope="module")
def compressed(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CompressedPipeline]:
    """Compressed on samples that grow and shrink; they stay so for the tests."""
    batches = CalibrationSet.batches

    def scaled(self: CalibrationSet, step: int, **options: Any) -> Iterator[Record]:
        for record in batches(self, step, **options):
            yield dataclasses.replace(record, sample=FACTORS[step] * record.sample)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CalibrationSet, "batches", scaled)
        out = tmp_path_factory.mktemp("ranges") / "out"
        yield compress.apply(tiny_pipeline, tiny_calibration, "w8a8+deepcache-3", out)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def skipped_sites(compressed: CompressedPipeline) -> list[str]:
    names = [site.name for site in sites_of(compressed.compression.scheme)]
    return [name for name in names if name.startswith(SKIPPED)]


@torch.no_grad()
def errors(compressed: CompressedPipeline, calibration_set: CalibrationSet) -> list[float]:
    """Of the feature that full passes leave at every step, relative to the float network's."""
    float_model, found = BranchedUNet(compressed.float_pipe.unet), []
    for step in range(6):
        x, time = next(calibration_set.batches(step)).sample, int(calibration_set.timesteps[step])
        exact = float_model.full(x, time, {}, branch=compressed.schedule.branch)[1]
        feature = compressed.denoiser.full(x, step, {})[1]
        assert exact is not None
        assert feature is not None
        found.append(rms(feature - exact) / rms(exact))
    return found


def test_skipped_layers_have_scales_that_differ_fourfold(compressed: CompressedPipeline) -> None:
    assert compressed.schedule.full_steps == FULL
    table, sites = compressed.compression.table, skipped_sites(compressed)
    assert len(sites) > 20
    far = [name for name in sites if table[f"{name}.scale"][2] > 4 * table[f"{name}.scale"][0]]
    assert {"down_blocks.0.downsamplers.0.conv.input.0", "up_blocks.0.resnets.0.conv_shortcut.input.0"} <= {
        *far
    }


def test_full_passes_use_the_scales_of_their_step_wherever_they_are(
    compressed: CompressedPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    """The scales that a cached step would have if it were given those of the full step before it."""
    compression = compressed.compression
    table = dict(compression.table)
    for name in skipped_sites(compressed):
        for kind in ("scale", "zero_point"):
            values = table[f"{name}.{kind}"]
            table[f"{name}.{kind}"] = values[[0, 0, 0, 3, 3, 3]]
    wrong = CompressedPipeline(compressed.float_pipe, dataclasses.replace(compression, table=table), tmp_path)
    own, others = errors(compressed, tiny_calibration), errors(wrong, tiny_calibration)
    assert max(own) < 0.05
    assert all(others[step] == own[step] for step in FULL)
    assert all(others[step] > 4 * own[step] for step in CACHED)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_an_artifact_does_too(
    backend: str, compressed: CompressedPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    deployed = deploy.load(deploy.export(compressed, tmp_path / "artifact"), backend=backend)
    for step in CACHED:
        x = next(tiny_calibration.batches(step)).sample
        expected = compressed.denoiser.full(x, step, {})[0]
        assert rms(deployed.denoiser.full(x, step, {})[0] - expected) < 0.03 * rms(expected)
