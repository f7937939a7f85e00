"""A whole artifact on the Triton kernels against the reference backend."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from errata import deploy
from errata.calibration import CalibrationSet
from errata.deploy.cuda import CudaLayer


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8+deepcache-2:branch=1"])
def test_an_artifact_agrees_with_the_reference_within_rounding_flips(
    recipe: str, tiny_artifact: Callable[[str], Path], tiny_calibration: CalibrationSet
) -> None:
    path = tiny_artifact(recipe)
    reference, int8 = (deploy.load(path, device="cpu", backend=name) for name in ("reference", "triton"))
    rows = [row for row in int8.backend_report() if row.scheme in ("w8a8", "w4a8")]
    assert {row.backend for row in rows} == {"triton"}
    assert len([part for part in int8.pipe.unet.module.modules() if isinstance(part, CudaLayer)]) == len(rows)
    step = 5
    x = next(tiny_calibration.batches(step)).sample[:1]
    expected, _ = reference.denoiser.full(x, step, {})
    found, feature = int8.denoiser.full(x, step, {})
    # Codes on a tie may round either way; later layers amplify that.
    assert rms(found - expected) <= 0.015 * rms(expected)
    if feature is not None:
        cached = int8.denoiser.cached(x, step, {}, feature)
        assert rms(cached - found) <= 0.015 * rms(expected)


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())
