"""Feature networks from a directory: the image side of a CLIP, a DINOv2, or another vision model of
transformers.

Source: Kynkäänniemi et al. 2023, "The Role of ImageNet Classes in Fréchet Inception Distance", for CLIP
features; Stein et al. 2023, "Exposing flaws of generative model evaluation metrics", for DINOv2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from errata.errors import ReportError, first_line
from errata.quality.pixels import check_colour


class VisionFeatures(nn.Module):
    """Pooled features of a vision model that `save_pretrained` wrote; a CLIP's are its projected ones.

    Images are resized to the model's square, bicubic with antialiasing and without keeping their aspect, and
    normalized as the saved image processor says; nothing is cropped.
    """

    channels = 3

    def __init__(self, folder: Path) -> None:
        """Load model and image processor from the directory; nothing is downloaded.

        Raises:
            ReportError: transformers is missing, or cannot load them.
        """
        super().__init__()
        self.model, processor = _load(folder)
        self.name = folder.resolve().name
        side = _side(processor, folder)
        self._size = (side, side)
        self.resizing = f"to {side}x{side} inside the network, bicubic with antialiasing"
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(processor.image_std).view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    mean: Tensor
    std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, D) float32 of images (B, 3, H, W), float32 in [0, 1].

        Raises:
            ReportError: the images have another number of channels.
        """
        check_colour(images, self.name)
        resized = F.interpolate(images, self._size, mode="bicubic", antialias=True).clamp(0, 1)
        return self._pooled((resized - self.mean) / self.std)

    def _pooled(self, pixels: Tensor) -> Tensor:
        if hasattr(self.model, "get_image_features"):
            features = self.model.get_image_features(pixels)
            return getattr(features, "pooler_output", features)
        output = self.model(pixels)
        pooled = getattr(output, "pooler_output", None)
        return pooled if pooled is not None else output.last_hidden_state[:, 0]


def _load(folder: Path) -> tuple[Any, Any]:
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError as problem:
        raise ReportError(
            f"feature network `{folder}` needs transformers ({problem}); install it with "
            "`pip install 'errata[text]'`"
        ) from problem
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True)
        return model, AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except Exception as problem:  # transformers raises whatever it likes
        reason = first_line(problem)
        raise ReportError(
            f"feature network `{folder}` cannot be loaded: {reason}; the directory must hold a vision model "
            "and its image processor, as save_pretrained writes them"
        ) from problem


def _side(processor: Any, folder: Path) -> int:
    """Return the square that the model sees: the crop if it crops, else what it resizes to."""
    for size in (getattr(processor, "crop_size", None), getattr(processor, "size", None)):
        for key in ("height", "shortest_edge"):
            value = size[key] if size and key in size else None
            if isinstance(value, int):
                return value
    raise ReportError(f"feature network `{folder}`: its image processor names no size; add `size` to it")
