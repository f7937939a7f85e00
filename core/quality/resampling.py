"""Samples drawn again with replacement: how often each is drawn, and the moments that follow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes for the weighted rows of one step: beyond the caches nothing is gained.
_BLOCK_BYTES = 2**26
# Numbers of counts that are held at once; 16 MB of float64.
_COUNTS = 2**21


def group_for(count: int) -> int:
    """Return how many resamples' counts to hold at once, for bounded memory."""
    return max(1, _COUNTS // count)


def resample_counts(count: int, resamples: int, *, seed: int, group: int | None = None) -> Iterator[Tensor]:
    """Yield how often each of `count` samples is drawn, (up to `group`, count) float64, for all resamples.

    The counts of a resample add up to `count`. They depend on `count`, `seed` and the resample's place alone,
    not on `group`, so two sets of equally many samples are resampled alike: their results are paired.

    Raises:
        ValueError: fewer than 2 samples or 1 resample.
    """
    if count < 2 or resamples < 1:
        raise ValueError(
            f"count={count}, resamples={resamples}; resampling needs at least 2 samples and 1 resample"
        )
    generator = torch.Generator().manual_seed(seed)
    size = min(group or resamples, resamples)
    for first in range(0, resamples, size):
        counts = torch.empty(min(size, resamples - first), count, dtype=torch.float64)
        for row in counts:
            drawn = torch.randint(count, (count,), generator=generator)
            row.copy_(torch.bincount(drawn, minlength=count))
        yield counts


class WeightedAccumulator:
    """Means and covariances of a stream of feature batches, under several weightings at once."""

    def __init__(self, counts: Tensor) -> None:
        """counts: (R, N); how often sample i of the stream counts in each of R resamples, N in sum."""
        self._counts = counts
        self._seen = 0
        # Around a typical value, sums of squares keep their digits.
        self._origin: Tensor | None = None
        self._sums = counts.new_zeros(0)
        self._scatters = counts.new_zeros(0)

    def add(self, features: Tensor) -> None:
        """Take in the next features (B, D), of any floating-point type, on the device where all of it runs.

        Raises:
            ValueError: there are more samples than counts.
        """
        resamples, expected = self._counts.shape
        if self._seen + len(features) > expected:
            raise ValueError(f"the features hold more than the {expected} samples that were announced")
        batch = features.detach().double()
        if self._origin is None:
            self._origin = batch.mean(dim=0)
            self._sums = torch.zeros_like(self._origin).repeat(resamples, 1)
            self._scatters = self._sums.unsqueeze(2).repeat(1, 1, batch.shape[1])
        rows = max(1, _BLOCK_BYTES // (8 * resamples * batch.shape[1]))
        for block in (batch - self._origin).split(rows):
            self._add_centred(block)

    def _add_centred(self, block: Tensor) -> None:
        weights = self._counts[:, self._seen : self._seen + len(block)].to(block)
        self._seen += len(block)
        self._sums += weights @ block
        weighted = weights.unsqueeze(2) * block
        self._scatters.baddbmm_(weighted.transpose(1, 2), block.expand(len(weights), -1, -1))

    def means_and_covariances(self) -> tuple[Tensor, Tensor]:
        """Return means (R, D) and unbiased covariances (R, D, D) of everything added, which ends adding.

        Raises:
            ValueError: there are fewer samples than counts.
        """
        count = self._counts.shape[1]
        if self._origin is None or self._seen != count:
            raise ValueError(f"the features hold {self._seen} samples; {count} were announced")
        shifts = self._sums / count
        self._scatters.baddbmm_(self._sums.unsqueeze(2), shifts.unsqueeze(1), alpha=-1)
        return self._origin + shifts, self._scatters.div_(count - 1)
