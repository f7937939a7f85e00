"""Lines through pairs, one for each channel and step, from a stream of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Gain = Literal["spread", "least_squares"]

# Below this share of its mean square, what varies in a channel is rounding error of its sums.
_CONSTANT = 1e-12
# Features of neighbouring steps differ less (embedded model, N = 15: gains of 0.5 to 2.3). A channel that
# hardly varies in the cache says little about one that does, and must not be blown up.
_LARGEST_SPREAD = 4.0


class ChannelFit:
    """`target ≈ gain · source + shift` for every step and channel; keeps sums only.

        shift = mean(target) - gain · mean(source)
        gain = cov(source, target) / var(source)        "least_squares"
        gain = std(target) / std(source)                "spread"

    A least squares line shrinks what it cannot predict towards the mean; the second gain leaves the corrected
    source the mean and the standard deviation of the target, up to four times its own. They agree where the
    target is affine in the source with a gain between 0 and 4.

    A channel whose source does not vary gets gain 1 and the difference of the means; a step without pairs is
    left as it is, gain 1 and shift 0.
    """

    def __init__(self, num_steps: int, channels: int) -> None:
        # Per step and channel: count, and the sums of x, y, x², xy, y².
        self._sums = torch.zeros(6, num_steps, channels, dtype=torch.float64)

    def add(self, step: int, source: Tensor, target: Tensor, *, channel_dim: int = 1) -> None:
        """Adds tensors of one shape that were seen at a step; all but the channels are positions.

        Sums are taken in float64.
        """
        x, y = (value.movedim(channel_dim, 0).flatten(1).double() for value in (source, target))
        count = torch.full((len(x),), float(x.shape[1]), dtype=torch.float64, device=x.device)
        sums = torch.stack([count, x.sum(1), y.sum(1), (x * x).sum(1), (x * y).sum(1), (y * y).sum(1)])
        self._sums[:, step] += sums.cpu()

    def solve(self, gain_of: Gain = "least_squares") -> tuple[Tensor, Tensor]:
        """`(gain, shift)`, each `(T, C)`, float32."""
        count = self._sums[0].clamp(min=1)
        x, y, xx, xy, yy = self._sums[1:] / count
        variance, covariance, wanted = xx - x * x, xy - x * y, (yy - y * y).clamp(min=0)
        is_constant = variance <= _CONSTANT * xx
        spread = (wanted / variance).sqrt().clamp(max=_LARGEST_SPREAD)
        found = covariance / variance if gain_of == "least_squares" else spread
        gain = torch.where(is_constant, 1.0, found)
        return gain.float(), (y - gain * x).float()
