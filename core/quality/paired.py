"""Distances between two images from the same noise."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.errors import ReportError

# Equal images have no finite PSNR; 1e-10 is 100 dB, and an error of one 8-bit level everywhere is 48 dB.
_SMALLEST_ERROR = 1e-10
# The window of Wang et al. 2004, in pixels: 11 wide, a Gaussian of 1.5.
_WINDOW = 11
_SIGMA = 1.5


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (B,) float64, in dB; equal images give 100 dB.

    images, reference: (B, C, H, W), in [0, 1] (data range 1).

    Raises:
        ValueError: the shapes differ.
    """
    require_same_shape(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error.clamp(min=_SMALLEST_ERROR))


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image, (B,) float64; 1 for equal images.

    images, reference: (B, C, H, W), in [0, 1] (data range 1).

    The window is the usual one, 11 pixels of a Gaussian of 1.5. An image with a side below 11 pixels gets
    the largest odd window that fits, with the Gaussian narrowed in proportion; such figures compare with
    their like alone.

    Raises:
        ReportError: torchmetrics is missing, or a side is below 3 pixels.
        ValueError: the shapes differ.

    Source: Wang et al. 2004, as torchmetrics computes it: at its borders an image is reflected.
    """
    require_same_shape(images, reference)
    window = ssim_window(min(images.shape[2:]))
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as problem:
        raise ReportError(
            f"SSIM needs torchmetrics ({problem}); install it with `pip install 'errata[report]'`"
        ) from problem
    # torchmetrics derives the window of a Gaussian from sigma and passes over kernel_size.
    similarity = structural_similarity_index_measure(
        images.double(),
        reference.double(),
        sigma=_SIGMA * window / _WINDOW,
        kernel_size=window,
        data_range=1.0,
        reduction="none",
    )
    return similarity.reshape(len(images))


def ssim_window(side: int) -> int:
    """The window, in pixels, for images whose shorter side is `side`.

    Raises:
        ReportError: below 3 pixels, where no window has a neighbourhood.
    """
    if side < 3:
        raise ReportError(f"images have a side of {side} pixels; SSIM needs at least 3")
    return min(_WINDOW, side if side % 2 else side - 1)


def require_same_shape(images: Tensor, reference: Tensor) -> None:
    """Refuse images and references that do not pair.

    Raises:
        ValueError: the shapes differ.
    """
    if images.shape != reference.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, their references {tuple(reference.shape)}"
        )
