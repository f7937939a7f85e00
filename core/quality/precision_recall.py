"""Improved precision and recall: what share of images looks real, and what share of the real is covered.

A set's manifold is estimated as the union of balls around its samples, each reaching to the sample's k-th
nearest neighbour in its own set. Precision is the share of generated samples inside the real manifold, recall
the share of real samples inside the generated one.

Source: Kynkäänniemi et al. 2019, equations 1 and 2, k = 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from errata.errors import ReportError
from errata.quality.intervals import Measured
from errata.quality.metric import Metric, SampleSet
from errata.quality.moments import check_features, check_same_dimension

# The paper's choice, section 3.1.
NEIGHBOURS = 3


def precision_and_recall(
    features: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS, block: int = 1000
) -> tuple[Tensor, Tensor]:
    """Return which generated samples are in the real manifold, (N,), and which real in the generated, (M,).

    Their means are precision and recall. Both bool, on the CPU. Memory beyond the features is that of
    `block` × max(N, M) distances. Recall falls with N and precision with M, so compare equal numbers.

    features: (N, D). real: (M, D), on the same device.

    Raises:
        ReportError: a set has no more samples than `neighbours`, or `neighbours` or `block` is below 1.
        ValueError: the sets have different dimensions.
    """
    return (
        coverage(features, real, neighbours=neighbours, block=block),
        coverage(real, features, neighbours=neighbours, block=block),
    )


def coverage(points: Tensor, others: Tensor, *, neighbours: int = NEIGHBOURS, block: int = 1000) -> Tensor:
    """Return whether each point (P, D) is in the manifold of the others (Q, D): (P,) bool, on the CPU.

    Raises:
        ReportError, ValueError: as `precision_and_recall`.
    """
    check_features(points)
    check_features(others)
    check_same_dimension(points.shape[1], others.shape[1])
    _check_counts(len(points), len(others), neighbours=neighbours, block=block)
    ours, theirs = points.detach().double(), others.detach().double()
    return _inside(ours, theirs, _radii(theirs, neighbours=neighbours, block=block), block=block).cpu()


def _radii(samples: Tensor, *, neighbours: int, block: int) -> Tensor:
    """Return the squared distance of each sample to its k-th nearest other one, (N,)."""
    radii = samples.new_empty(len(samples))
    for radius, distances in zip(radii.split(block), _squares(samples, samples, block), strict=True):
        # The nearest of all is the sample itself.
        radius.copy_(distances.kthvalue(neighbours + 1, dim=1).values)
    return radii


def _inside(points: Tensor, centres: Tensor, radii: Tensor, *, block: int) -> Tensor:
    """Return whether each point is in any of the balls, (P,) bool."""
    return torch.cat([(distances <= radii).any(dim=1) for distances in _squares(points, centres, block)])


def _squares(x: Tensor, y: Tensor, block: int) -> Iterator[Tensor]:
    """Yield squared distances of x (P, D) to y (Q, D), by products; float64 keeps the digits that they cost.

    Up to `block` rows at a time, all in the same place: glibc before 2.38 does not reuse what aligned tensors
    give back.
    """
    room = x.new_empty(min(block, len(x)), len(y))
    own, theirs = x.square().sum(dim=1), y.square().sum(dim=1)
    for part, square in zip(x.split(block), own.split(block), strict=True):
        product = torch.mm(part, y.T, out=room[: len(part)])
        yield product.mul_(-2).add_(theirs).add_(square.unsqueeze(1)).clamp_(min=0)


def _check_counts(points: int, others: int, *, neighbours: int, block: int) -> None:
    if neighbours < 1 or block < 1:
        raise ReportError(
            f"neighbours={neighbours}, block={block} of precision and recall; both must be at least 1"
        )
    if min(points, others) <= neighbours:
        raise ReportError(
            f"precision and recall of {points} images against {others} with neighbours={neighbours}; use "
            "more images than neighbours, and a few thousand for a meaningful figure"
        )


def _precision(samples: SampleSet) -> Measured | None:
    if samples.real is None or min(len(samples.compared), len(samples.real)) <= NEIGHBOURS:
        return None
    return Measured.mean(coverage(samples.compared, samples.real, block=samples.block))


def _recall(samples: SampleSet) -> Measured | None:
    if samples.real is None or min(len(samples.compared), len(samples.real)) <= NEIGHBOURS:
        return None
    return Measured.mean(coverage(samples.real, samples.compared, block=samples.block))


METRICS = (
    Metric(
        name="precision",
        title="Precision",
        higher_is_better=True,
        needs="real features",
        compute=_precision,
        description=f"share of images within reach of a real one's {NEIGHBOURS} nearest, {{real}}",
    ),
    Metric(
        name="recall",
        title="Recall",
        higher_is_better=True,
        needs="real features",
        compute=_recall,
        description=f"share of real images within reach of a generated one's {NEIGHBOURS} nearest, {{real}}",
    ),
)
