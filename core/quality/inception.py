"""The feature network of the FID: Inception v3 with TensorFlow's weights, as torch-fidelity ported it.

Its weights, and its resizing to 299 pixels as TensorFlow 1 did it, are what published FIDs were measured
with; torchvision's Inception v3 has others.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errata.errors import ReportError, first_line
from errata.quality.pixels import check_colour, to_bytes

_POOLED = "2048"


class InceptionFeatures(nn.Module):
    """Pooled features of Inception v3, 2048 of them, and its class scores."""

    name = "inception-v3"
    channels = 3
    dimension = 2048
    classes = 1008
    resizing = "to 299x299 inside the network, bilinear as in TensorFlow 1, from 8-bit values"

    def __init__(self, weights: Path | None = None) -> None:
        """Load the weights from a file of torch-fidelity's layout, or download torch-fidelity's own once.

        Raises:
            ReportError: torch-fidelity or torchvision is missing, or the weights cannot be loaded.
        """
        super().__init__()
        extractor = _extractor_class()
        if weights is not None:
            _check_plain_tensors(weights)
        try:
            self.extractor = extractor(
                "inception-v3-compat",
                [_POOLED],
                feature_extractor_weights_path=None if weights is None else str(weights),
            )
        except (OSError, RuntimeError) as problem:
            reason = first_line(problem)
            source = "torch-fidelity's address" if weights is None else f"`{weights}`"
            raise ReportError(
                f"the weights of Inception v3 cannot be loaded from {source}: {reason}; download "
                f"`{_address()}` and give it as inception:FILE"
            ) from problem
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 2048) float32 of images (B, 3, H, W) in [0, 1], rounded to 8 bits as in a file.

        Raises:
            ReportError: the images have another number of channels.
        """
        check_colour(images, self.name)
        return self.extractor(to_bytes(images))[0]

    def logits(self, features: Tensor) -> Tensor:
        """Return class scores (B, 1008) of features (B, 2048), no bias, as in the inception score."""
        weight = self.extractor.fc.weight
        return features.to(weight) @ weight.T


def _extractor_class() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as problem:
        raise ReportError(
            f"feature network `inception` needs torch-fidelity and torchvision ({problem}); install them "
            "with `pip install 'errata[metrics]'`"
        ) from problem
    return FeatureExtractorInceptionV3


def _address() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return str(URL_INCEPTION_V3)


def _check_plain_tensors(weights: Path) -> None:
    """Check that a file exists and cannot run code; torch-fidelity unpickles whatever it is given."""
    if not weights.is_file():
        raise ReportError(
            f"weights file `{weights}` of Inception v3 does not exist; give a file, or `inception`"
        )
    try:
        torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as problem:
        reason = first_line(problem)
        raise ReportError(
            f"weights file `{weights}` of Inception v3 is not a file of tensors: {reason}; give one that "
            "torch.save wrote, such as torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        ) from problem
