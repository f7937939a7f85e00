"""A whole network on code for CPUs with fewer instructions: exact int8 products, and one program a call."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cpu_builds import BUILDS, running

from errata import deploy
from errata.deploy.cpu import attention_kernel, int8, native
from errata.deploy.cpu.planned_unet import PlannedUNet
from errata.deploy.cpu.vnni import VNNIProduct
from errata.deploy.engines.agreement import distance
from errata.errors import ArtifactError
from errata.runtime.layers import Geometry

Artifact = Callable[[str], Path]
BOUND = 0.05
PRODUCTS = {"avx2": "AVX2", "avxvnni": "AVX-VNNI", "avx512": "AVX2"}


@pytest.fixture(params=list(BUILDS))
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(int8, "has_onednn", lambda: False)  # torch knows no VNNI there
    with running(request.param):
        yield request.param


def test_the_build_is_the_one_that_is_asked_for(build: str) -> None:
    assert native.product_name() == PRODUCTS[build]
    assert attention_kernel.attention_kinds() == (attention_kernel.AttentionKind.FLOATS,)
    assert not native.has_tiles()


def test_a_network_with_attention_runs_as_a_program(build: str, tiny_artifact: Artifact) -> None:
    path = tiny_artifact("w8a8")
    reference, deployed = deploy.load(path, backend="reference").denoiser, deploy.load(path)
    rows = deployed.backend_report()
    assert {row.backend for row in rows if row.kind in ("conv2d", "linear")} == {"vnni", "weight only"}
    assert any(f"int8 kernel available, by {PRODUCTS[build]}" in row.reason for row in rows)
    assert any("in float32 by vectors" in row.reason for row in rows)
    network = deployed.pipe.unet.module
    assert isinstance(network, PlannedUNet)
    for seed in range(3):  # the third call is the program's
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        found, _ = deployed.denoiser.full(x, 0, {})
        assert distance(found, reference.full(x, 0, {})[0]) <= BOUND
        assert distance(found, reference.full(x, 1, {})[0]) > 2 * BOUND
    assert network.plan().startswith("native programs of")


def test_the_scheme_is_followed_as_the_reference_does(build: str, tiny_artifact: Artifact) -> None:
    path = tiny_artifact("w8a8")
    reference, exact = (deploy.load(path, backend=name).denoiser for name in ("reference", "vnni"))
    x = torch.randn(2, 1, 8, 8)
    assert distance(exact.full(x, 1, {})[0], reference.full(x, 1, {})[0]) <= 1e-4


def test_onednn_is_refused_where_it_would_saturate(build: str, tiny_artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="oneDNN uses: its products would saturate"):
        deploy.load(tiny_artifact("w8a8"), backend="onednn")


def test_codes_that_would_saturate_do_not(build: str) -> None:
    """Two products of 255 by 127 are more than 16 bits hold."""
    geometry = Geometry(torch.nn.Linear(64, 32, bias=False))
    product = VNNIProduct(geometry, torch.full((32, 64), 127, dtype=torch.int8), torch.ones(32))
    codes = torch.full((3, 64), 255, dtype=torch.uint8)
    found = product(codes, (1.0, 0), None, None, torch.float32)
    assert torch.equal(found, torch.full((3, 32), 64.0 * 255 * 127))
