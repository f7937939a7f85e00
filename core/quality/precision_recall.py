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
from errata.quality.moments import require_features, require_same_dimension

# The paper's choice, section 3.1.
NEIGHBOURS = 3


def precision_and_recall(
    features: Tensor, real: Tensor, *, neighbours: int = NEIGHBOURS, block: int = 1000
) -> tuple[Tensor, Tensor]:
    """Whether each generated sample is in the real manifold, (N,), and each real one in the generated, (M,).

    Their means are precision and recall. Both bool, on the CPU. Memory beyond the features is that of
    `block` × max(N, M) distances. Recall falls with N and precision with M, so compare equal numbers.

    features: (N, D). real: (M, D), on the same device.

    Raises:
        ReportError: a set has no more samples than `neighbours`, or `neighbours` or `block` is below 1.
        ValueError: the sets have different dimensions.
    """
    require_features(features)
    require_features(real)
    require_same_dimension(features.shape[1], real.shape[1])
    _check_counts(len(features), len(real), neighbours=neighbours, block=block)
    ours, theirs = features.detach().double(), real.detach().double()
    precise = _inside(ours, theirs, _radii(theirs, neighbours=neighbours, block=block), block=block)
    recalled = _inside(theirs, ours, _radii(ours, neighbours=neighbours, block=block), block=block)
    return precise.cpu(), recalled.cpu()


def _radii(samples: Tensor, *, neighbours: int, block: int) -> Tensor:
    """Squared distance of each sample to its k-th nearest other one, (N,)."""
    radii = samples.new_empty(len(samples))
    for radius, distances in zip(radii.split(block), _squares(samples, samples, block), strict=True):
        # The nearest of all is the sample itself.
        radius.copy_(distances.kthvalue(neighbours + 1, dim=1).values)
    return radii


def _inside(points: Tensor, centres: Tensor, radii: Tensor, *, block: int) -> Tensor:
    """Whether each point is in any of the balls, (P,) bool."""
    return torch.cat([(distances <= radii).any(dim=1) for distances in _squares(points, centres, block)])


def _squares(x: Tensor, y: Tensor, block: int) -> Iterator[Tensor]:
    """Squared distances of x (P, D) to y (Q, D), by products; float64 keeps the digits that they cost.

    Up to `block` rows at a time, all in the same place: glibc before 2.38 does not reuse what aligned tensors
    give back.
    """
    room = x.new_empty(min(block, len(x)), len(y))
    own, theirs = x.square().sum(dim=1), y.square().sum(dim=1)
    for part, square in zip(x.split(block), own.split(block), strict=True):
        product = torch.mm(part, y.T, out=room[: len(part)])
        yield product.mul_(-2).add_(theirs).add_(square.unsqueeze(1)).clamp_(min=0)


def _check_counts(n: int, m: int, *, neighbours: int, block: int) -> None:
    if neighbours < 1 or block < 1:
        raise ReportError(
            f"neighbours={neighbours}, block={block} of precision and recall; both are at least 1"
        )
    for number, name in ((n, "generated"), (m, "real")):
        if number <= neighbours:
            raise ReportError(
                f"precision and recall of {number} {name} images with neighbours={neighbours}; more images "
                "than neighbours are needed, and a few thousand for a figure that means something"
            )
