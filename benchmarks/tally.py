"""Accumulate what a benchmark needs of one cell's images, batch by batch; in memory, unlike a report."""

from __future__ import annotations

import statistics as summary
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from errata.correct.sampling import Sampled
from errata.quality.frechet import (
    FeatureStatistics,
    bootstrap_interval,
    frechet_distance,
    paired_bootstrap,
    statistics,
)
from errata.quality.intervals import Estimate, mean_estimate
from errata.quality.paired import psnr
from errata.quality.reference import Reference
from errata.runtime.schedule import StepKind


class Tally:
    """Grows with the number of samples by one feature vector and one number each; a few images are kept."""

    def __init__(self, *, shown: int) -> None:
        self._features: list[Tensor] = []
        self._psnr: list[Tensor] = []
        self._shown: list[Tensor] = []
        self._room = shown
        self._sizes: list[int] = []
        self.seconds: list[float] = []
        self._base: dict[StepKind, float] = {}
        self._extra: dict[StepKind, float] = {}

    def add(self, sampled: Sampled, reference: Reference, *, float_images: Tensor | None) -> None:
        """Take in a batch; `float_images` are the float model's from the same noise."""
        count = len(sampled.images)
        self._features.append(reference.features(sampled.images))
        if float_images is not None:
            self._psnr.append(psnr(sampled.images, float_images))
        if self._room > 0:
            self._shown.append(sampled.images[: self._room])
            self._room -= len(self._shown[-1])
        self._sizes.append(count)
        self.seconds.append(sampled.seconds)
        for total, counts in ((self._base, sampled.base), (self._extra, sampled.extra)):
            for kind, number in counts.items():
                total[kind] = total.get(kind, 0.0) + number * count

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything in it as arrays, for a file; `from_arrays` reads them back."""
        counted = {
            f"{name}.{kind}": np.asarray(number)
            for name, counts in (("base", self._base), ("extra", self._extra))
            for kind, number in counts.items()
        }
        if self._psnr:
            counted["psnr"] = torch.cat(self._psnr).numpy()
        if self._shown:
            counted["shown"] = self.shown.numpy()
        return counted | {
            "features": self.features.numpy(),
            "sizes": np.asarray(self._sizes),
            "seconds": np.asarray(self.seconds),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Tally:
        """Inverse of `arrays`; arrays of other names are passed over. It has no room for more images."""
        tally = cls(shown=0)
        tally._features = [torch.from_numpy(arrays["features"])]
        tally._sizes = arrays["sizes"].tolist()
        tally.seconds = arrays["seconds"].tolist()
        for name, kept in (("psnr", tally._psnr), ("shown", tally._shown)):
            if name in arrays:
                kept.append(torch.from_numpy(arrays[name]))
        kinds: tuple[StepKind, ...] = ("full", "cached")
        for kind in kinds:
            for name, counts in (("base", tally._base), ("extra", tally._extra)):
                if f"{name}.{kind}" in arrays:
                    counts[kind] = float(arrays[f"{name}.{kind}"])
        return tally

    @property
    def samples(self) -> int:
        """Number of images so far."""
        return sum(self._sizes)

    @property
    def features(self) -> Tensor:
        """Features (N, D), float64."""
        return torch.cat(self._features)

    @property
    def psnr(self) -> Tensor | None:
        """PSNR of each image to the float model's, (N,) float64, if that was sampled."""
        return torch.cat(self._psnr) if self._psnr else None

    @property
    def mean_psnr(self) -> Estimate | None:
        """Mean over the images, if the float model was sampled."""
        values = self.psnr
        return mean_estimate(values) if values is not None else None

    @property
    def shown(self) -> Tensor:
        """The first images, (at most `shown`, C, H, W)."""
        return torch.cat(self._shown)

    @property
    def evaluations(self) -> dict[str, float]:
        """Denoiser calls per image, by kind."""
        kinds = dict.fromkeys((*self._base, *self._extra))
        return {kind: (self._base.get(kind, 0) + self._extra.get(kind, 0)) / self.samples for kind in kinds}

    @property
    def seconds_per_image(self) -> float:
        """Median over batches."""
        return summary.median(time / size for time, size in zip(self.seconds, self._sizes, strict=True))

    def frechet(self, target: FeatureStatistics, *, resamples: int, seed: int) -> Estimate:
        """Fréchet distance to the reference."""
        features = self.features
        distance = frechet_distance(statistics(features), target)
        return Estimate(distance, bootstrap_interval(features, target, resamples=resamples, seed=seed))

    def change_from(self, other: Tally, target: FeatureStatistics, *, resamples: int, seed: int) -> Estimate:
        """Its Fréchet distance minus the other's, paired."""
        difference = frechet_distance(statistics(self.features), target) - frechet_distance(
            statistics(other.features), target
        )
        interval = paired_bootstrap(other.features, self.features, target, resamples=resamples, seed=seed)
        return Estimate(difference, interval)

    def psnr_change_from(self, other: Tally) -> Estimate | None:
        """Its mean PSNR minus the other's, paired."""
        if self.psnr is None or other.psnr is None:
            return None
        return mean_estimate(self.psnr - other.psnr)
