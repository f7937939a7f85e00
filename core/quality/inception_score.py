"""Inception score: how sure a classifier is of each image, and how many classes it sees overall.

| symbol  | meaning                                                  |
|---------|----------------------------------------------------------|
| p(y|x)  | class probabilities of one image, (C,)                   |
| p(y)    | their mean over the images of a split                    |
| IS      | exp E_x KL(p(y|x) ‖ p(y)), from 1 to the number of classes |

The expectation is the mean over images of Σ p(y|x) log p(y|x), minus Σ p(y) log p(y): means over images are
all that it takes, which makes resampling cheap.

Source: Salimans et al. 2016, "Improved Techniques for Training GANs", section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from errata.errors import ReportError
from errata.quality.intervals import Measured
from errata.quality.metric import Metric, SampleSet
from errata.quality.moments import check_features
from errata.quality.resampling import group_for, resample_counts


def inception_score(logits: Tensor, *, splits: int = 1) -> float:
    """Return the score of logits or log probabilities (N, C): the mean over `splits` contiguous parts.

    The usual 10 splits make a figure comparable with published ones; a split of few images lowers it.

    Raises:
        ReportError: fewer images than splits, or no split.
    """
    check_features(logits)
    count = len(logits)
    if not 1 <= splits <= count:
        raise ReportError(f"splits={splits} for {count} images; give 1 to {count}, 10 are usual")
    bounds = [index * count // splits for index in range(splits + 1)]
    parts = [logits[low:high] for low, high in pairwise(bounds)]
    scores = [weighted_inception_score(part, torch.ones(len(part), dtype=torch.float64)) for part in parts]
    return float(torch.stack(scores).mean())


def streamed_inception_score(chunks: Iterable[Tensor]) -> float:
    """Return the score in one split of logits that come in pieces (B, C).

    Raises:
        ValueError: there are none.
    """
    certainty, marginal, seen = torch.zeros(1).double(), torch.zeros(()).double(), 0
    for logits in chunks:
        weights = torch.ones(1, len(logits), dtype=torch.float64, device=logits.device)
        more, classes = _weighted_sums(logits, weights)
        certainty, marginal, seen = certainty + more.cpu(), marginal + classes.cpu(), seen + len(logits)
    if not seen:
        raise ValueError("there are no logits to score")
    return float(_score(certainty, marginal, torch.tensor([float(seen)]))[0])


def weighted_inception_score(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the score when image i counts `weights[i]` times: a float64 scalar, or (R,) for rows of weights.

    logits: (N, C), or log probabilities. weights: (N,) or (R, N), not negative, each row with a positive sum.

    Raises:
        ValueError: the weights do not fit the logits.
    """
    check_features(logits)
    if weights.shape[-1] != len(logits) or weights.ndim not in (1, 2):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} for {len(logits)} images; expected (images,) or "
            "(resamples, images)"
        )
    rows = weights.reshape(-1, len(logits)).to(logits.device, torch.float64)
    certainty, marginal = _weighted_sums(logits, rows)
    scores = _score(certainty, marginal, rows.sum(dim=1))
    return scores if weights.ndim == 2 else scores[0]


def resampled_inception_scores(
    chunks: Callable[[], Iterable[Tensor]], count: int, *, resamples: int, seed: int
) -> Tensor:
    """Return scores in one split for images drawn with replacement, (resamples,) float64 on the CPU.

    Drawn as for `errata.quality.frechet.resampled_distances`, so rows of equally many images are paired.

    chunks: returns the logits afresh, as tensors (B, C) in the order of the images.
    count: how many images they hold together.

    Raises:
        ValueError: another number of images than `count`.
    """
    groups = resample_counts(count, resamples, seed=seed, group=group_for(count))
    return torch.cat([_resampled(chunks(), counts) for counts in groups])


def _resampled(logits_in_pieces: Iterable[Tensor], counts: Tensor) -> Tensor:
    certainty, marginal, seen = torch.zeros(len(counts)).double(), torch.zeros(()).double(), 0
    count = counts.shape[1]
    for logits in logits_in_pieces:
        weights = counts[:, seen : seen + len(logits)]
        seen += len(logits)
        if seen > count:
            break
        more, classes = _weighted_sums(logits, weights.to(logits.device))
        certainty, marginal = certainty + more.cpu(), marginal + classes.cpu()
    if seen != count:
        raise ValueError(f"the logits hold {seen} images or more; {count} were announced")
    return _score(certainty, marginal, counts.sum(dim=1))


def _weighted_sums(logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums over images of Σ p(y|x) log p(y|x), (R,), and of p(y|x), (R, C); weights (R, N) float64."""
    log_p = logits.detach().double().log_softmax(dim=1)
    p = log_p.exp()
    return weights @ torch.xlogy(p, p).sum(dim=1), weights @ p


def _score(certainty: Tensor, marginal: Tensor, total: Tensor) -> Tensor:
    p = marginal / total.unsqueeze(1)
    return (certainty / total - torch.xlogy(p, p).sum(dim=1)).exp()


def _measure(samples: SampleSet) -> Measured | None:
    if samples.logits is None:
        return None
    replicates = resampled_inception_scores(
        samples.logits, samples.count, resamples=samples.resamples, seed=samples.seed
    )
    return Measured(streamed_inception_score(samples.logits()), replicates=replicates)


METRICS = (
    Metric(
        name="inception_score",
        title="Inception score",
        higher_is_better=True,
        needs="logits",
        compute=_measure,
        description="from the class probabilities of {network}, {samples} images, one split",
    ),
)
