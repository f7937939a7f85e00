"""A small trained model inside the package, for demonstrations and tests without a download.

`PIPELINE` is a diffusers folder: 16x16 handwritten digits, sampled with `DDIMPipeline`. `load_features` opens
the feature network behind the Fréchet distance in digit features: a small classifier of handwritten digits
whose last hidden layer serves as a feature space. It is not an Inception network: distances measured here can
be compared with each other and with nothing else.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from errata.errors import ReportError

__all__ = ["PIPELINE", "DigitFeatures", "load_features", "reference_features", "reference_statistics"]

PIPELINE: Path = Path(__file__).parent / "digits"
"""Folder for `DDIMPipeline.from_pretrained`; `training.json` inside says how it was trained."""

FOLDER: Path = Path(__file__).parent / "digit_features"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
REFERENCE_FILE = "reference.npz"


class DigitFeatures(nn.Module):
    """Classifier of 16x16 digits; calling it gives the features before the last layer."""

    name = "digit-features"
    channels = 1
    resolution = 16
    classes = 10
    resizing = "none: takes 16x16 pixels alone"

    def __init__(self, dimension: int = 64) -> None:
        """Build the untrained network with `dimension` features."""
        super().__init__()
        self.dimension = dimension
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.bottleneck = nn.Linear(64 * 4 * 4, dimension)
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(dimension, self.classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, (B, dimension) float32: a linear bottleneck, so of both signs.

        images: (B, 1, 16, 16), float32 in [0, 1].

        Raises:
            ReportError: the images have another shape.
        """
        expected = (1, self.resolution, self.resolution)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ReportError(
                f"images have shape {tuple(images.shape)}; {self.name} takes (B, 1, 16, 16): "
                "one channel, 16x16 pixels, values in [0, 1]; for other images use another network, such as "
                "errata.quality.open_network('inception')"
            )
        return self.bottleneck(self.body(2 * images - 1))

    def classify(self, images: Tensor) -> Tensor:
        """Return the class scores, (B, 10) float32, before the softmax; images as for `forward`."""
        return self.logits(self(images))

    def logits(self, features: Tensor) -> Tensor:
        """Return the class scores, (B, 10), of features (B, dimension) as `forward` returns them."""
        return self.head(features.to(self.bottleneck.weight))


def read_config() -> dict[str, Any]:
    """Return the stored description: dimension, test accuracy, digest of the weights and so on."""
    return json.loads((FOLDER / CONFIG_FILE).read_text(encoding="utf-8"))


def load_features() -> DigitFeatures:
    """Return the trained network on the CPU, in evaluation mode, with gradients off.

    Raises:
        ReportError: the weights are not those that the configuration names.
        RuntimeError: the weights do not fit the network.
    """
    config = read_config()
    stored = (FOLDER / WEIGHTS_FILE).read_bytes()
    digest = hashlib.sha256(stored).hexdigest()
    if digest != config["weights_sha256"]:
        raise ReportError(
            f"{FOLDER / WEIGHTS_FILE} has digest {digest}, {CONFIG_FILE} says "
            f"{config['weights_sha256']}; reinstall the package"
        )
    network = DigitFeatures(dimension=config["dimension"])
    network.load_state_dict(load_tensors(stored), strict=True)
    return network.eval().requires_grad_(False)


def reference_statistics() -> tuple[np.ndarray, np.ndarray, int]:
    """Return mean, covariance and count of the features of all the real digits.

    mean: (dimension,), float64. covariance: (dimension, dimension), float64, unbiased.
    """
    with np.load(FOLDER / REFERENCE_FILE, allow_pickle=False) as stored:
        return stored["mu"], stored["sigma"], int(stored["count"])


def reference_features() -> np.ndarray:
    """Return the features of all the real digits, (count, dimension) float32, rounded to float16."""
    with np.load(FOLDER / REFERENCE_FILE, allow_pickle=False) as stored:
        return stored["features"].astype(np.float32)
