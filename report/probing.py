"""Whether images of a pipeline can be measured, found out without sampling any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from errata.errors import ReportError
from errata.quality.reference import Reference
from errata.report.scoring import Scorer


def check_images(reference: Reference, scorer: Scorer, pipes: Sequence[Any]) -> None:
    """Shows noise of the size that each pipeline makes to the feature network, and to what scores images.

    Raises:
        ReportError: one refuses it or is not installed, the features do not fit the reference, or there are
            several sizes.
    """
    sizes = {image_size(pipe) for pipe in pipes} - {None}
    if len(sizes) > 1:
        raise ReportError(
            f"the artifacts make images of several sizes, {sorted(map(str, sizes))} (height, width, "
            "channels); report on them one by one"
        )
    for height, width, channels in filter(None, sizes):
        noise = torch.rand(2, channels, height, width)
        reference.features(noise)
        scorer.paired(noise, noise.flip(0))


def image_size(pipe: Any) -> tuple[int, int, int] | None:
    """Height, width and channels of a diffusers pipeline's images by default; None where it does not say."""
    size = getattr(pipe.unet.config, "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    decoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if decoder is None:
        return height, width, int(pipe.unet.config.out_channels)
    factor = 2 ** (len(decoder.config.block_out_channels) - 1)
    return height * factor, width * factor, int(decoder.config.out_channels)
