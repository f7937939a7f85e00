"""Distances between two images from the same noise."""

from __future__ import annotations

import torch
from torch import Tensor

# Equal images have no finite PSNR; 1e-10 is 100 dB, and an error of one 8-bit level everywhere is 48 dB.
_SMALLEST_ERROR = 1e-10


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (B,) float64, in dB; equal images give 100 dB.

    images, reference: (B, C, H, W), in [0, 1] (data range 1).

    Raises:
        ValueError: the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, their references {tuple(reference.shape)}"
        )
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp(min=_SMALLEST_ERROR))
