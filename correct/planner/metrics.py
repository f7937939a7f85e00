"""What the planner minimizes: the distance to real images, or to a cache-free run of the same artifact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from errata.correct.sampling import Sampler
from errata.quality.frechet import (
    FeatureStatistics,
    bootstrap_interval,
    frechet_distance,
    paired_bootstrap,
    statistics,
)
from errata.quality.intervals import Estimate, mean_estimate
from errata.quality.reference import Reference

# Enough to choose by an interval: its ends are quantiles, known to a few per cent of its width.
_RESAMPLES = 200
# With fewer images the normal approximation of an interval is poor.
_FIRST_LOOK = 16
# Of features: with more, the resampled distances of one comparison take as long as many images.
_LARGEST_DIMENSION = 256


class Metric(Protocol):
    """A metric; smaller is better. It keeps a few numbers of every image, which is all that it needs later.

    Attributes:
        name: for messages.
        reference: what images are compared with.
        least: with fewer images, the order of candidates is mostly chance.
        projects: whether `projected` gets better with more images of the uncorrected run.
        first_look: with so many images, intervals of `change` mean something; None if they take long.
    """

    name: str
    reference: str
    least: int
    projects: bool
    first_look: int | None

    def against(self, batch: range) -> Callable[[Tensor], Tensor]:
        """Return a function from images `(B, C, H, W)` of these indices to what is kept of them, `(B, D)`."""

    def value(self, kept: Tensor) -> float:
        """Return the metric of what was kept of all images, `(N, D)`."""

    def projected(self, kept: Tensor, plain: Tensor) -> float:
        """Return an estimate of `value` for as many images as `plain`, from what was kept of the first ones.

        kept: `(n, D)` of a plan. plain: `(N, D)` of the uncorrected run, from the same noise, N at least n.
        """

    def estimate(self, kept: Tensor) -> Estimate:
        """Return the same as `value`, with its interval."""

    def change(self, kept: Tensor, other: Tensor) -> Estimate:
        """Return `value(kept) - value(other)`, paired: row i of both comes from the same noise."""


class FrechetMetric:
    """Fréchet distance to a reference; keeps features. Intervals are bootstrapped with `seed`.

    The distance of a few images is mostly noise, but the same noise for all plans. So it is projected: the
    change that a plan made to mean and covariance of its first images is added to those of all uncorrected
    images. With 18 plans, the ranks by 64 images then correlated with those by 512 images at 0.72 instead of
    0.43, and by 128 images at 0.82 instead of 0.43 (digits, 64 features, DeepCache of interval 10).
    """

    projects = True

    def __init__(self, reference: Reference, *, seed: int) -> None:
        self.name = f"Fréchet distance in {reference.name}"
        self.reference = reference.source
        # With fewer images than features a covariance is singular: the ranks by 16 images correlated at 0.2.
        self.least = reference.statistics.dimension
        is_quick = self.least <= _LARGEST_DIMENSION
        self.first_look = max(_FIRST_LOOK, 2 * self.least) if is_quick else None
        self._reference = reference
        self._seed = seed

    def against(self, batch: range) -> Callable[[Tensor], Tensor]:
        """Return the function that computes features."""
        return self._reference.features

    def value(self, kept: Tensor) -> float:
        """Return the metric, see `Metric.value`."""
        return frechet_distance(statistics(kept), self._reference.statistics)

    def projected(self, kept: Tensor, plain: Tensor) -> float:
        """Return the projected distance; negative eigenvalues of the sum of covariances count as 0."""
        own, first, all_of_them = statistics(kept), statistics(plain[: len(kept)]), statistics(plain)
        moved = FeatureStatistics(
            all_of_them.mean + own.mean - first.mean,
            all_of_them.covariance + own.covariance - first.covariance,
            len(plain),
        )
        return frechet_distance(moved, self._reference.statistics)

    def estimate(self, kept: Tensor) -> Estimate:
        """Return the metric with its interval."""
        target = self._reference.statistics
        interval = bootstrap_interval(kept, target, resamples=_RESAMPLES, seed=self._seed)
        return Estimate(self.value(kept), interval)

    def change(self, kept: Tensor, other: Tensor) -> Estimate:
        """Return the paired difference with its interval."""
        target = self._reference.statistics
        interval = paired_bootstrap(other, kept, target, resamples=_RESAMPLES, seed=self._seed)
        return Estimate(self.value(kept) - self.value(other), interval)


class AgreementMetric:
    """Mean over images of the root-mean-square difference of pixels in [0, 1] to those of `sampler`."""

    name = "RMS difference of pixels"
    least = 4
    projects = False
    first_look: int | None = _FIRST_LOOK

    def __init__(self, sampler: Sampler, *, reference: str) -> None:
        self.reference = reference
        self._sampler = sampler

    def against(self, batch: range) -> Callable[[Tensor], Tensor]:
        """Return the difference to the batch of `sampler`, which is sampled now."""
        target = self._sampler.sample(batch).images.double()

        def difference(images: Tensor) -> Tensor:
            return (images.double() - target).square().flatten(1).mean(dim=1, keepdim=True).sqrt()

        return difference

    def value(self, kept: Tensor) -> float:
        """Return the metric, see `Metric.value`."""
        return float(kept.mean())

    def projected(self, kept: Tensor, plain: Tensor) -> float:
        """Return `value(kept)`: a mean needs no projection."""
        return self.value(kept)

    def estimate(self, kept: Tensor) -> Estimate:
        """Return the metric with its interval."""
        return mean_estimate(kept[:, 0])

    def change(self, kept: Tensor, other: Tensor) -> Estimate:
        """Return the paired difference with its interval."""
        return mean_estimate((kept - other)[:, 0])
