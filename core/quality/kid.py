"""Kernel distance (KID): the squared maximum mean discrepancy of two sets of features.

| symbol   | meaning                                                                   |
|----------|---------------------------------------------------------------------------|
| k(x, y)  | (x·y / D + 1)³                                                            |
| MMD²     | mean of k over pairs i ≠ j of each set, minus twice its mean over both sets |

Unlike the Fréchet distance it has no bias at few samples, and may therefore be below zero.

Source: Bińkowski et al. 2018, "Demystifying MMD GANs", equation 4 and section 4.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from errata.errors import ReportError
from errata.quality.intervals import Measured
from errata.quality.metric import Metric, SampleSet
from errata.quality.moments import check_features, check_same_dimension

# The paper's kernel.
_DEGREE = 3
_OFFSET = 1.0


def kernel_distances(
    features: Tensor, real: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Tensor:
    """Return MMD² of each random subset, (subsets,) float64 on the CPU; their mean is the KID.

    Rows are drawn without replacement. Which ones depends on the numbers of rows, the subset size and `seed`
    alone, so two sets of equally many features are compared on the same rows. Subsets are no larger than
    `subset_size_for` says.

    features: (N, D). real: (M, D), on the same device.

    Raises:
        ReportError: no subsets, or too few rows for one.
        ValueError: the sets have different dimensions.
    """
    check_features(features)
    check_features(real)
    check_same_dimension(features.shape[1], real.shape[1])
    if subsets < 1:
        raise ReportError(f"subsets={subsets} of a kernel distance; at least 1 is needed, 100 are usual")
    size = subset_size_for(len(features), len(real), subset_size)
    rows = _subset_rows(len(features), len(real), subsets=subsets, size=size, seed=seed)
    return torch.stack([mmd2(features[ours].double(), real[theirs].double()) for ours, theirs in rows]).cpu()


def subset_size_for(n: int, m: int, wanted: int) -> int:
    """Return the subset size for `n` features and `m` real ones: `wanted`, or the smaller of both.

    Raises:
        ReportError: it is below 2, so there is no pair.
    """
    size = min(n, m, wanted)
    if size < 2:
        raise ReportError(
            f"a kernel distance of {n} images to {m} real ones in subsets of {wanted} has no pairs; use at "
            "least 2 of each; 1000 are usual"
        )
    return size


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased MMD² of x (n, D) and y (m, D), a scalar; n and m at least 2."""
    within_x, within_y = _mean_of_pairs(_kernel(x, x)), _mean_of_pairs(_kernel(y, y))
    return within_x + within_y - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + _OFFSET) ** _DEGREE


def _mean_of_pairs(k: Tensor) -> Tensor:
    """Return the mean over i ≠ j."""
    n = len(k)
    return (k.sum() - k.trace()) / (n * (n - 1))


def _subset_rows(n: int, m: int, *, subsets: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(subsets):
        ours = torch.randperm(n, generator=generator)[:size]
        yield ours, torch.randperm(m, generator=generator)[:size]


def kernel_distance_parts(features: Tensor, real: Tensor, *, block: int = 1000) -> Tensor:
    """Return MMD² over all samples as the mean of one number for each generated sample, (N,) float64.

    What the mean over random subsets estimates, without their noise. A part's distance from the mean is the
    sample's influence on MMD² to first order, so intervals of the parts' mean, and of paired differences, are
    those of the kernel distance (Hoeffding's projection of a U-statistic of order two); the real samples
    count as known. Memory beyond the features is that of `block` × max(N, M) numbers.

    features: (N, D), N at least 2. real: (M, D), M at least 2.

    Raises:
        ReportError: too few rows.
        ValueError: the sets have different dimensions.
    """
    check_features(features)
    check_features(real)
    check_same_dimension(features.shape[1], real.shape[1])
    subset_size_for(len(features), len(real), max(len(features), len(real)))
    x, y = features.detach().double(), real.detach().double()
    within, across = _mean_to_others(x, block), _mean_to(x, y, block)
    distance = within.mean() + _mean_to_others(y, block).mean() - 2 * across.mean()
    return (distance + 2 * (within - within.mean()) - 2 * (across - across.mean())).cpu()


def _mean_to(x: Tensor, y: Tensor, block: int) -> Tensor:
    """Return the mean of k(x_i, y_j) over j, (N,)."""
    means, room = x.new_empty(len(x)), x.new_empty(min(block, len(x)), len(y))
    for part, mean in zip(x.split(block), means.split(block), strict=True):
        # In one place throughout: glibc before 2.38 does not reuse what aligned tensors give back.
        k = torch.mm(part, y.T, out=room[: len(part)])
        torch.mean(k.div_(x.shape[1]).add_(_OFFSET).pow_(_DEGREE), dim=1, out=mean)
    return means


def _mean_to_others(x: Tensor, block: int) -> Tensor:
    """Return the mean of k(x_i, x_j) over j ≠ i, (N,)."""
    own = (x.square().sum(dim=1) / x.shape[1] + _OFFSET) ** _DEGREE
    return (_mean_to(x, x, block) * len(x) - own) / (len(x) - 1)


def _measure(samples: SampleSet) -> Measured | None:
    if samples.real is None:
        return None
    return Measured.mean(kernel_distance_parts(samples.compared, samples.real, block=samples.block))


METRICS = (
    Metric(
        name="kid",
        title="KID",
        higher_is_better=False,
        needs="real features",
        compute=_measure,
        description="squared maximum mean discrepancy, cubic kernel, {real}; unscaled",
    ),
)
