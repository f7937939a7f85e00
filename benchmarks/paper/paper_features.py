"""Feature networks that a row can name, and reference statistics in their features.

python benchmarks/paper/paper_features.py IMAGES --out references/cifar10-inception.npz
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from paper_rows import NETWORKS
from torch import Tensor, nn

from errata.embedded import load_features
from errata.errors import ReportError
from errata.report import Reference


class BlockMeans(nn.Module):
    """Means of the four quarters of an image, for tries in seconds; they say nothing about quality."""

    name = "block-means"

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 4) of images (B, C, H, W)."""
        return nn.functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 2).flatten(1)


class Inception(nn.Module):
    """The 2048 pooled features of Inception v3 that FID is defined by, in torch-fidelity's port.

    Images are rounded to 8 bits, as files are, and resized by the network's own first layer.
    """

    name = "inception-v3-compat 2048 (torch-fidelity)"

    def __init__(self, weights: Path | None = None) -> None:
        """Fetch the weights, or take those of a file."""
        super().__init__()
        extractor = _extractor_class()
        path = None if weights is None else str(weights)
        self.body = extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of images (B, 3, H, W), float32 in [0, 1]."""
        pixels = (images * 255).round().clamp(0, 255).to(torch.uint8)
        features: Tensor = self.body(pixels)[0]
        return features


def network(name: str, *, weights: Path | None = None, device: str = "cpu") -> nn.Module:
    """The feature network of that name, in evaluation mode.

    Raises:
        ReportError: no such network, or torch-fidelity is not installed.
    """
    if name not in NETWORKS:
        raise ReportError(f"feature network {name!r} is unknown; allowed are {', '.join(NETWORKS)}")
    if name == "inception":
        made: nn.Module = Inception(weights)
    else:
        made = load_features() if name == "embedded" else BlockMeans()
    return made.to(device).eval().requires_grad_(False)


def open_reference(source: str, features: nn.Module) -> Reference:
    """Statistics of real images in these features.

    Raises:
        ReportError: nothing is there, or it does not fit the network.
    """
    if source != "embedded" and not Path(source).exists():
        raise ReportError(
            f"reference `{source}` does not exist; make it with "
            "`python benchmarks/paper/paper_features.py IMAGES --out FILE.npz`, or give --reference"
        )
    return Reference.open(source, features)


def main() -> None:
    """Write the statistics of a folder of real images."""
    parser = argparse.ArgumentParser(description="Reference statistics of a folder of real images.")
    parser.add_argument("images", type=Path, help="folder of PNG or JPEG files, all of the model's size")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.npz")
    parser.add_argument("--feature-network", choices=NETWORKS, default="inception")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="instead of fetching them")
    options = parser.parse_args()
    features = network(options.feature_network, weights=options.inception_weights)
    reference = Reference.from_folder(options.images, features)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    reference.save(options.out)
    print(f"{reference.source}, in {reference.name}: {options.out}")


def _extractor_class() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as problem:
        raise ReportError(
            f"the feature network `inception` needs {problem.name}: pip install 'errata[metrics]' "
            "torchvision, or give another --feature-network"
        ) from problem
    return FeatureExtractorInceptionV3


if __name__ == "__main__":
    main()
