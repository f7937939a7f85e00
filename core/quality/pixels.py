"""Images as values in [0, 1], and as the bytes of a file."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.errors import ReportError


def to_bytes(images: Tensor) -> Tensor:
    """Return the uint8 values of images in [0, 1], as in an image file: rounded, not truncated."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def check_colour(images: Tensor, taker: str) -> None:
    """Check that images are (B, 3, H, W); `taker` is named in the error.

    Raises:
        ReportError: another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ReportError(
            f"images have shape {tuple(images.shape)}; {taker} takes (B, 3, H, W): three channels, values in "
            "[0, 1]"
        )
