"""On a real device: the kernels, one graph for all steps, no waiting for the device."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata import deploy
from errata.calibration import CalibrationSet
from errata.deploy import DeployedPipeline
from errata.deploy.cuda import GraphedUNet
from errata.deploy.cuda.candidates import INT_MM
from errata.deploy.cuda.operators import activation_codes
from errata.deploy.cuda.selection import Fixed
from errata.deploy.cuda.tiles import TILES
from errata.errors import ArtifactError
from errata.runtime.ranges import quantize

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels"),
]

Artifact = Callable[[str], Path]
BOUNDS = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
CASES = [
    (nn.Conv2d(64, 96, 3, padding=1), (64,), (2, 64, 17, 16)),
    (nn.Conv2d(64, 96, 3, padding=1, stride=2), (64,), (2, 64, 16, 17)),
    (nn.Conv2d(37, 21, 3, padding=1), (20, 17), (1, 37, 9, 5)),
    (nn.Conv2d(96, 64, 1, bias=False), (32, 64), (3, 96, 8, 8)),
    (nn.Linear(320, 640), (320,), (1, 320)),
    (nn.Linear(768, 320, bias=False), (768,), (2, 77, 768)),
]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", [*TILES, INT_MM])
@pytest.mark.parametrize(("module", "widths", "shape"), CASES)
def test_a_layer_equals_float64_arithmetic_on_its_codes(
    module: nn.Conv2d | nn.Linear,
    widths: tuple[int, ...],
    shape: tuple[int, ...],
    name: str,
    bits: int,
    dtype: torch.dtype,
    make_case: Callable[..., Any],
) -> None:
    if name == INT_MM and (shape[0] == 1 or 37 in shape):
        pytest.skip("torch._int_mm takes more than 16 rows, and multiples of 8")
    case = make_case(module, widths, Fixed(name), bits=bits)
    x = (torch.randn(shape) * 2).to(dtype)
    residual = torch.randn_like(case.expected(x, 0).float()).to(dtype)
    layer, outputs = case.layer.cuda(), []
    for step in range(3):
        with case.context.at(step):
            outputs.append(layer(x.cuda(), residual.cuda()).cpu())
        expected = case.expected(x, step, residual)
        bound = BOUNDS[dtype] * expected.abs().max()
        assert (outputs[-1] - expected).abs().max() <= bound
        assert all((output - expected).abs().max() > 10 * bound for output in outputs[:-1])


def test_codes_are_those_of_the_reference() -> None:
    x = torch.randn(4, 9, 11, 70) * 3
    x[0] = (torch.arange(x[0].numel()).reshape(x[0].shape) - 3000) * 0.5 * 0.02  # ties
    scales, zero_points = torch.tensor([0.1, 0.02]), torch.tensor([3, 90], dtype=torch.int32)
    inputs = (x, scales, zero_points, torch.tensor([1]))
    codes = activation_codes(*(value.cuda() for value in inputs)).cpu()
    assert torch.equal(codes.int() + 128, quantize(x, scales[1], zero_points[1], bits=8).int())


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8+deepcache-3"])
def test_one_graph_serves_every_step(
    recipe: str,
    backend: str,
    tiny_artifact: Artifact,
    tiny_calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    eager = deploy.load(tiny_artifact(recipe), device="cuda", backend=backend)
    samples = [next(tiny_calibration.batches(step)).sample.cuda() for step in range(6)]
    expected = [eager.denoiser.full(sample, step, {}) for step, sample in enumerate(samples)]
    graphed = deploy.load(tiny_artifact(recipe), device="cuda", backend=backend)
    record(graphed)
    for step in (0, 3, 5, 1, 0):
        found, feature = graphed.denoiser.full(samples[step], step, {})
        torch.testing.assert_close(found, expected[step][0], rtol=1e-5, atol=1e-5)
        if feature is not None:
            cached = graphed.denoiser.cached(samples[step], 4, {}, feature)
            torch.testing.assert_close(
                cached, eager.denoiser.cached(samples[step], 4, {}, feature), rtol=1e-5, atol=1e-5
            )
    other, _ = graphed.denoiser.full(samples[0], 3, {})
    assert (other - expected[0][0]).abs().max() > 1e-3  # another step shows
    assert len(graphed.pipe.unet._denoiser._unet._captured) == 1 + (recipe != "w8a8")


@pytest.mark.parametrize("is_graphed", [False, True])
def test_no_step_waits_for_the_device(
    is_graphed: bool, tiny_artifact: Artifact, tiny_calibration: CalibrationSet
) -> None:
    deployed = deploy.load(tiny_artifact("w8a8"), device="cuda", backend="triton")
    if is_graphed:
        record(deployed)
    samples = [next(tiny_calibration.batches(step)).sample.cuda() for step in range(6)]
    deployed.denoiser.full(samples[0], 0, {})
    with without_synchronizing():
        for step, sample in enumerate(samples):
            deployed.denoiser.full(sample, step, {})


def test_a_new_shape_in_a_capture_is_refused(
    tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path))
    deployed = deploy.load(tiny_artifact("w8a8"), device="cuda")
    x = torch.ones(2, 1, 8, 8, device="cuda")
    deployed.denoiser.full(x[:1], 0, {})  # another shape; libraries make their handles
    with (
        pytest.raises(ArtifactError, match="for the first time while a program is recorded"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        deployed.denoiser.full(x, 0, {})


def record(deployed: DeployedPipeline) -> None:
    denoiser = deployed.pipe.unet._denoiser
    denoiser._unet = GraphedUNet(denoiser._unet)
    denoiser.reuses_outputs = True


@contextmanager
def without_synchronizing() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_step_is_where_the_layers_are(tiny_artifact: Artifact) -> None:
    deployed = deploy.load(tiny_artifact("w8a8"), device="cuda", backend="triton")
    context = deployed.pipe.unet._denoiser._context
    shown: Tensor = context.follow(torch.device("cuda", torch.cuda.current_device()))
    with context.at(3):
        assert shown.is_cuda
        assert shown.tolist() == [3]
