"""Numbers of single images: how far from others of the same noise they are, how well they fit a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from errata.errors import ReportError
from errata.quality.paired import psnr, ssim

Paired = Callable[[Tensor, Tensor], Tensor]
"""`(B, C, H, W)` twice, in [0, 1], to `(B,)`."""

Prompted = Callable[[Tensor, Sequence[str]], Tensor]
"""`(B, C, H, W)` in [0, 1] and B prompts to `(B,)`."""

LPIPS, CLIP = "lpips", "clip_score"


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What is measured of single images beside their features.

    Attributes:
        lpips: a learned distance, such as `errata.quality.lpips.Lpips()`; None leaves it out.
        clip: a score of image and prompt, such as `errata.quality.clip_score.ClipScore(…)`; None leaves it
            out.
    """

    lpips: Paired | None = None
    clip: Prompted | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all scores that are measured where images have a counterpart and a prompt."""
        optional = ((LPIPS, self.lpips), (CLIP, self.clip))
        return ("psnr", "ssim", *(name for name, score in optional if score is not None))

    @property
    def facts(self) -> dict[str, str]:
        """Which model gives each score that depends on one."""
        models = ((LPIPS, self.lpips), (CLIP, self.clip))
        return {
            name: str(getattr(model, "name", type(model).__name__))
            for name, model in models
            if model is not None
        }

    def paired(self, images: Tensor, others: Tensor) -> dict[str, Tensor]:
        """Distances of images from others of the same noise, `(B,)` each."""
        scores = {"psnr": psnr(images, others), "ssim": ssim(images, others)}
        return scores if self.lpips is None else scores | {LPIPS: self.lpips(images, others)}

    def prompted(self, images: Tensor, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """How well images fit the prompts that they were made from, `(B,)`."""
        if self.clip is None:
            return {}
        return {CLIP: self.clip(images, prompts_of(arguments, len(images)))}


def prompts_of(arguments: Mapping[str, Any], count: int) -> list[str]:
    """The prompt of each image of a pipeline call.

    Raises:
        ReportError: it has none.
    """
    prompt = arguments.get("prompt")
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt or ())
    if len(prompts) != count or not all(isinstance(each, str) for each in prompts):
        raise ReportError(
            f"a CLIP score needs a prompt for each of {count} images, the pipeline is called with "
            f"{len(prompts)}; give prompts, or leave the CLIP score out"
        )
    return prompts
