"""A tiny artifact with quantized layers and a cache, made by the real stages, and features to judge it in."""

from collections.abc import Iterator

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


@pytest.fixture(scope="session")
def deployed(tiny_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> DeployedPipeline:
    """`w8a8+deepcache-2` of the tiny pipeline at four steps: steps 0 and 2 are full."""
    folder = tmp_path_factory.mktemp("artifact")
    trajectories = calibration.collect(
        tiny_pipeline, folder / "trajectories", num_inference_steps=4, num_samples=4, batch_size=4
    )
    compressed = compress.apply(tiny_pipeline, trajectories, "w8a8+deepcache-2", folder / "compressed")
    return deploy.load(deploy.export(compressed, folder / "artifact"), device="cpu")


@pytest.fixture
def reference() -> Reference:
    """Random images in block means."""
    network = BlockMeans()
    return Reference(network, statistics(network(torch.rand(50, 1, 8, 8))), "random images", network.name)
