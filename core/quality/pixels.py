"""Images as values in [0, 1], and as the bytes of a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from errata.errors import ReportError


def from_array(images: np.ndarray[Any, Any]) -> Tensor:
    """Return what a pipeline makes with output type "np", (N, H, W, C), as (N, C, H, W) float32 in [0, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float().clamp(0, 1)


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
