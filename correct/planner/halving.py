"""Successive halving: many candidates on few samples, few candidates on many.

Each round doubles the number of samples and keeps the better half of the candidates, so that all rounds but
the first cost about the same, and most samples go to those that may win.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
AISTATS 2016, algorithm 1. Deviations: samples of earlier rounds are kept, as the noise is the same; the
yardstick, which corrects nothing, takes part in every round and is never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.correct.planner.metrics import Metric
from errata.correct.planner.trial import Trial

# Few enough to be sampled at full length, enough for a cheaper plan to tie with the best.
_FINALISTS = 3

# Of the best plan's gain. With more, images that seem to be as good as without a cache, and are not, win.
_NEXT_TO_NOTHING = 0.02

# The first round has no more than this part of all samples, or it would cost more than all others together.
_LARGEST_FIRST = 4


def round_sizes(candidates: int, samples: int, *, least: int) -> list[int]:
    """Samples at the end of each round, rising to `samples`.

    The first round has at least `least`, if that leaves room for two more.
    """
    first = min(least, max(2, samples // _LARGEST_FIRST))
    sizes = [samples]
    while candidates > _FINALISTS and sizes[0] // 2 >= first:
        sizes.insert(0, sizes[0] // 2)
        candidates = kept_of(candidates)
    return sizes


def kept_of(candidates: int) -> int:
    """How many of so many candidates a round keeps."""
    return (candidates + 1) // 2


def total_samples(candidates: int, sizes: Sequence[int]) -> int:
    """Images that the rounds take, those of the yardstick included."""
    total, before = sizes[-1], 0
    for size in sizes:
        total += candidates * (size - before)
        candidates, before = kept_of(candidates), size
    return total


def ranked(trials: Sequence[Trial], none: Trial, metric: Metric) -> list[Trial]:
    """Best first, as far as is known; of equals the cheaper first, then the one that was named first."""
    plain = none.kept
    return sorted(trials, key=lambda trial: (metric.projected(trial.kept, plain), trial.overhead))


def cheapest_of_the_best(finalists: Sequence[Trial], none: Trial, metric: Metric) -> Trial:
    """The cheapest of those that are as good as the best one, as far as is known, and of these the best.

    As good is what the paired comparison cannot tell from the best, and what loses next to nothing of its
    gain over `none` besides: a comparison of few images can tell little, and the budget is there to be spent.

    finalists: best first, all with the same samples.
    """
    leader = finalists[0]
    gain = metric.change(none.kept, leader.kept).value
    tied = [leader]
    for trial in finalists[1:]:
        if trial.overhead < leader.overhead:  # no other can be preferred to the leader
            worse_by = metric.change(trial.kept, leader.kept)
            if not worse_by.interval.excludes_zero and worse_by.value <= _NEXT_TO_NOTHING * gain:
                tied.append(trial)
    return min(tied, key=lambda trial: trial.overhead)
