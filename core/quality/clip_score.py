"""CLIP score: how well an image fits its prompt, as a CLIP sees it.

Source: Hessel et al. 2021, "CLIPScore", with the factor 100 of torchmetrics in place of the paper's 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errata.errors import ReportError, first_line
from errata.quality.metric import Metric
from errata.quality.pixels import to_bytes

# What torchmetrics, and so most papers, take.
DEFAULT_MODEL = "openai/clip-vit-large-patch14"


class ClipScore:
    """`ClipScore()(images, prompts)`: 100 · max(cos, 0) of each image and its prompt."""

    def __init__(
        self, model_name_or_path: str | Path = DEFAULT_MODEL, *, device: str | torch.device | None = None
    ) -> None:
        """Load any CLIP by hub name or from a local directory.

        Images are prepared by the model's PIL processor even where torchvision is installed, so that a score
        does not depend on what else is.

        Raises:
            ReportError: transformers is missing, or it cannot load the model.
        """
        self.name = f"CLIP score ({model_name_or_path})"
        self._model, self._tokenizer, self._processor = _load(str(model_name_or_path))
        self._device = torch.device(device or "cpu")
        self._model.to(self._device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float64 on the CPU, from 0 to 100.

        images: (B, C, H, W) in [0, 1], C 1 or 3; grey is repeated, and values are rounded to 8 bits.
        prompts: one an image. What is beyond the model's context is cut, and the end-of-text token kept.

        Raises:
            ReportError: another number of prompts or channels.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ReportError(f"images have shape {tuple(images.shape)}; {self.name} takes (B, 1 or 3, H, W)")
        if len(prompts) != len(images):
            raise ReportError(f"{len(images)} images have {len(prompts)} prompts; {self.name} needs one each")
        cosines = (self._image_features(images) * self._text_features(prompts)).sum(dim=1)
        return (100 * cosines).clamp(min=0).cpu()

    def _image_features(self, images: Tensor) -> Tensor:
        pixels = list(to_bytes(images).expand(-1, 3, -1, -1).cpu())
        prepared = self._processor(images=pixels, return_tensors="pt", input_data_format="channels_first")
        values = prepared["pixel_values"].to(self._device, self._model.dtype)
        return _normalized(self._model.get_image_features(values))

    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        length = int(self._model.config.text_config.max_position_embeddings)
        tokens = self._tokenizer(
            list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=length
        ).to(self._device)
        return _normalized(self._model.get_text_features(tokens["input_ids"], tokens["attention_mask"]))


def _normalized(features: Any) -> Tensor:
    """Return unit vectors, float64; transformers 5 wraps the features, earlier releases return them."""
    values = getattr(features, "pooler_output", features).double()
    return values / values.norm(dim=1, keepdim=True)


def _load(name: str) -> tuple[Any, Any, Any]:
    try:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
    except ImportError as problem:
        raise ReportError(
            f"the CLIP score needs transformers ({problem}); install it with `pip install 'errata[text]'`"
        ) from problem
    try:
        return (
            CLIPModel.from_pretrained(name),
            AutoTokenizer.from_pretrained(name),
            AutoImageProcessor.from_pretrained(name, backend="pil"),
        )
    except Exception as problem:  # transformers and the hub raise whatever they like
        reason = first_line(problem)
        raise ReportError(
            f"CLIP `{name}` cannot be loaded: {reason}; give a hub name such as {DEFAULT_MODEL}, or a "
            "directory with a CLIP's model, tokenizer and image processor"
        ) from problem


METRICS = (
    Metric(  # computed where a model is given: `ClipScore`
        name="clip_score",
        title="CLIP score",
        higher_is_better=True,
        needs="prompts",
        description="fit of image and prompt, mean over {samples} images",
    ),
)
