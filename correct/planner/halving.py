"""Successive halving: many candidates on few samples, few candidates on many.

Each round doubles the number of samples and keeps the better half of the candidates, so that all rounds but
the first cost about the same, and most samples go to those that may win. A `Trial` is a candidate under test.

Between the rounds, and before the first one, the candidates race: at every doubling of the samples one is
dropped that is known to be worse than the best one or than no correction, or that costs no less than the best
one and can be better by next to nothing only. "Known" is by the paired interval, widened because there are
many looks. A search that is decided ends.

Nothing is gained by measuring what has little chance to be shown to help. A candidate is dropped that is no
better than no correction on half of the images, and the best one is not measured again if its gain, on the
very images that it was chosen by, is less than half an interval. Both can only lead to no correction.

Source: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
AISTATS 2016, algorithm 1. Deviations: samples of earlier rounds are kept, as the noise is the same; the
run without correction takes part in every round and is never dropped. Maron and Moore, "Hoeffding races",
NIPS 1993. Deviation: intervals of paired differences, which are far narrower than Hoeffding's bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from errata.correct.costs import Costs, overhead_of, plain_evaluations, price
from errata.correct.planner.candidates import Candidate
from errata.correct.planner.metrics import Metric
from errata.correct.sampling import Sampled, Sampler
from errata.errors import PlanError
from errata.quality.intervals import Estimate
from errata.runtime.schedule import CacheSchedule, StepKind

# Few enough to sample completely, enough for a cheaper plan to tie with the best.
_FINALISTS = 3

# Relative to the best plan's gain. With more, plans win whose images only seem as good as without a cache.
_NEXT_TO_NOTHING = 0.02

# The first round has at most this part of all samples, or it would cost more than all others together.
_LARGEST_FIRST = 4


# Counts of evaluations are means over batches, in floating point.
_ROUNDING = 1e-6

# Of a 95 % interval; makes it 99.7 %, since each of about ten candidates is looked at up to six times.
_WIDER = 1.5
# Of the distance from a gain to the lower end of its 95 % interval; about one standard error.
_PROMISING = 0.5
# A mean is known well enough if its interval reaches no further than this part of it.
_PRECISE = 0.1


class Trial:
    """A candidate under test: its sampler, and what the metric keeps of its images so far.

    Attributes:
        candidate: what is tried.
        overhead: as predicted, a fraction.
        samples: number of images so far, which are the first ones by index.
    """

    def __init__(self, candidate: Candidate, sampler: Sampler, schedule: CacheSchedule, costs: Costs) -> None:
        self.candidate = candidate
        self.sampler = sampler
        self.samples = 0
        self.overhead = overhead_of(candidate.extra, schedule, costs)
        self._plain, self._costs = plain_evaluations(schedule), costs
        self._evaluations: dict[StepKind, float] = {}
        self._kept: list[Tensor] = []

    def add(self, sampled: Sampled, score: Callable[[Tensor], Tensor]) -> None:
        """Add a batch.

        Raises:
            PlanError: it took more evaluations than the candidate promised.
        """
        count = len(sampled.images)
        self._kept.append(score(sampled.images))
        for counts in (sampled.base, sampled.extra):
            for kind, number in counts.items():
                self._evaluations[kind] = self._evaluations.get(kind, 0.0) + number * count
        self.samples += count
        if self.measured_overhead > self.overhead + _ROUNDING:
            raise PlanError(
                f"candidate {self.candidate.name!r} promised {dict(self.candidate.extra)!r} extra "
                f"evaluations, {self.overhead:.2%} overhead, but took {self.measured_overhead:.2%}; "
                "correct its `extra`"
            )

    @property
    def kept(self) -> Tensor:
        """What the metric keeps, `(samples, D)`."""
        return torch.cat(self._kept)

    @property
    def measured_overhead(self) -> float:
        """The overhead by the evaluations that were made, a fraction."""
        taken: Mapping[StepKind, float] = {k: n / self.samples for k, n in self._evaluations.items()}
        plain = price(self._plain, self._costs)
        return (price(taken, self._costs) - plain) / plain


def extend(trials: Sequence[Trial], metric: Metric, batches: Sequence[range], *, bar: tqdm[NoReturn]) -> None:
    """Sample these batches under every trial, from equal noise."""
    for batch in batches:
        score = metric.against(batch)
        for trial in trials:
            trial.add(trial.sampler.sample(batch), score)
            bar.update(len(batch))


def round_sizes(candidates: int, samples: int, *, least: int) -> list[int]:
    """Return the number of samples at the end of each round, rising to `samples`.

    The first round has at least `least`, if that leaves room for two more.
    """
    first = min(least, max(2, samples // _LARGEST_FIRST))
    sizes = [samples]
    while candidates > _FINALISTS and sizes[0] // 2 >= first:
        sizes.insert(0, sizes[0] // 2)
        candidates = kept_of(candidates)
    return sizes


def kept_of(candidates: int) -> int:
    """Return how many of these candidates a round keeps."""
    return (candidates + 1) // 2


def total_samples(candidates: int, sizes: Sequence[int]) -> int:
    """Return the number of images of all rounds, with those without correction."""
    total, before = sizes[-1], 0
    for size in sizes:
        total += candidates * (size - before)
        candidates, before = kept_of(candidates), size
    return total


def ranked(trials: Sequence[Trial], none: Trial, metric: Metric) -> list[Trial]:
    """Return the trials best first, as far as is known; of equals the cheaper first, then the earlier one."""
    plain = none.kept
    return sorted(trials, key=lambda trial: (metric.projected(trial.kept, plain), trial.overhead))


def cheapest_of_the_best(finalists: Sequence[Trial], none: Trial, metric: Metric) -> Trial:
    """Return the cheapest finalist that is as good as the best one, as far as is known.

    A finalist is as good if the paired comparison cannot tell it from the best, and if it also loses next to
    nothing of its gain over `none`: few images can decide little, and the budget is there to be used.

    finalists: best first, all with the same samples.
    """
    leader = finalists[0]
    gain = metric.change(none.kept, leader.kept).value
    tied = [leader]
    for trial in finalists[1:]:
        if trial.overhead < leader.overhead:  # no dearer one can replace the leader
            worse_by = metric.change(trial.kept, leader.kept)
            if not worse_by.interval.excludes_zero and worse_by.value <= _NEXT_TO_NOTHING * gain:
                tied.append(trial)
    return min(tied, key=lambda trial: trial.overhead)


def looks(sizes: Sequence[int], first: int | None) -> list[int]:
    """Return `sizes`, with halves of the smallest one before it, down to `first`; None adds none."""
    added = list(sizes)
    while first is not None and added[0] // 2 >= first:
        added.insert(0, added[0] // 2)
    return added


def undecided(
    best_first: Sequence[Trial], none: Trial, metric: Metric, *, samples: int | None = None
) -> list[Trial]:
    """Return the trials that may yet be the best choice, in the same order; none if no correction is.

    `samples` is the number of images that the search may make; None keeps what is no better on half of them.
    """
    if not best_first:
        return []
    leader = best_first[0]
    gain = _compared(none, leader, metric).value
    alive = []
    for trial in best_first:
        if _low(_compared(trial, none, metric)) > 0:
            continue
        if samples is not None and not is_better_so_far(trial, none, metric, samples=samples):
            continue
        if trial is not leader:
            worse_by = _low(_compared(trial, leader, metric))
            is_no_cheaper = trial.overhead >= leader.overhead
            if worse_by > 0 or (is_no_cheaper and gain > 0 and worse_by >= -_NEXT_TO_NOTHING * gain):
                continue
        alive.append(trial)
    return alive


def is_better_so_far(trial: Trial, none: Trial, metric: Metric, *, samples: int) -> bool:
    """Return whether a trial is better than no correction on half of `samples` images; True before."""
    count = min(trial.samples, none.samples)
    if metric.first_look is None or count < metric.first_look or 2 * count < samples:
        return True
    return metric.value(trial.kept[:count]) < metric.value(none.kept[:count])


def is_promising(trial: Trial, none: Trial, metric: Metric) -> bool:
    """Return whether other images may well show that a trial helps, by its gain on those of the search."""
    if metric.first_look is None:
        return True
    gain = _compared(none, trial, metric)
    return gain.value > 0 and gain.value >= _PROMISING * (gain.value - gain.interval.low)


def is_decided(alive: Sequence[Trial], none: Trial, metric: Metric) -> bool:
    """Return whether nothing is left to choose between: no candidate, or one that is known to help."""
    if len(alive) != 1:
        return not alive
    return _low(_compared(none, alive[0], metric)) > 0


def is_precise(estimate: Estimate) -> bool:
    """Return whether more images would hardly change an estimate."""
    return estimate.interval.high - estimate.interval.low <= 2 * _PRECISE * abs(estimate.value)


def _compared(trial: Trial, other: Trial, metric: Metric) -> Estimate:
    """Return by how much a trial is worse than another one, on the images that both have."""
    count = min(trial.samples, other.samples)
    return metric.change(trial.kept[:count], other.kept[:count])


def _low(estimate: Estimate) -> float:
    """Return the lower end of the widened interval."""
    return estimate.value - _WIDER * (estimate.value - estimate.interval.low)
