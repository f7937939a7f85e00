"""A tiny artifact with quantized layers and a cache, made by the real stages, and features to judge it in."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from torch import Tensor, nn

from errata import calibration, compress, deploy
from errata.deploy import DeployedPipeline
from errata.report import Reference, statistics


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tensors are so small here that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class BlockMeans(nn.Module):
    """Four block means of a grey image as its features."""

    name = "block-means"
    channels = 1

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


# `BlockMeans` as a module of a user's.
FOUR_MEANS = """
from torch import nn

class FourMeans(nn.Module):
    name, channels = "block-means", 1

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
"""


@pytest.fixture(scope="session")
def exported(tiny_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`w8a8+deepcache-2` of the tiny pipeline at four steps: steps 0 and 2 are full.

    Beside it lie `reference.npz` and `four_means.py`, for programs that know no fixtures.
    """
    folder = tmp_path_factory.mktemp("artifact")
    trajectories = calibration.collect(
        tiny_pipeline, folder / "trajectories", num_inference_steps=4, num_samples=4, batch_size=4
    )
    compressed = compress.apply(tiny_pipeline, trajectories, "w8a8+deepcache-2", folder / "compressed")
    (folder / "four_means.py").write_text(FOUR_MEANS, encoding="utf-8")
    real = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    network = BlockMeans()
    Reference(network, statistics(network(real)), "random images", network.name).save(
        folder / "reference.npz"
    )
    return deploy.export(compressed, folder / "artifact")


@pytest.fixture(scope="session")
def deployed(exported: Path) -> DeployedPipeline:
    """The artifact, loaded."""
    return deploy.load(exported, device="cpu")


@pytest.fixture(scope="session")
def reference() -> Reference:
    """Random images in block means."""
    network = BlockMeans()
    real = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Reference(network, statistics(network(real)), "random images", network.name)
