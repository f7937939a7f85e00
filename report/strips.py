"""Rows of small images from equal seeds, as PNG files for the page."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from errata.quality.pixels import to_bytes


def strip(images: Tensor) -> bytes:
    """PNG of images (N, C, H, W), C 1 or 3, in [0, 1], side by side with transparent gaps."""
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels; a picture needs 1 or 3")
    gap = gap_of(width)
    canvas = torch.zeros(channels + 1, height, count * (width + gap) - gap, dtype=torch.uint8)
    for index, image in enumerate(images):
        left = index * (width + gap)
        canvas[:channels, :, left : left + width] = to_bytes(image)
        canvas[channels, :, left : left + width] = 255
    picture = Image.fromarray(canvas.permute(1, 2, 0).contiguous().numpy(), "LA" if channels == 1 else "RGBA")
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def gap_of(width: int) -> int:
    """Pixels between two images."""
    return max(1, width // 16)


def data_uri(png: bytes) -> str:
    """The PNG as a `data:` address."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
