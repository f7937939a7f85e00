"""Racing: a candidate whose defeat is known is sampled no further, and a search that is decided ends.

Between the rounds of successive halving, and before the first one, candidates are compared at every doubling
of the samples. One is dropped when it is known to be worse than the best one or than no correction, or when
it costs no less than the best one and can be better by next to nothing only. "Known" is by the paired
interval, widened because there are many looks.

Source: Maron and Moore, "Hoeffding races", NIPS 1993. Deviation: intervals of paired differences, which are
far narrower than Hoeffding's bound for each candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.correct.planner.halving import NEXT_TO_NOTHING, Trial
from errata.correct.planner.metrics import Metric
from errata.quality.intervals import Estimate

# Of a 95 % interval; makes it 99.7 %, since each of about ten candidates is looked at up to six times.
_WIDER = 1.5
# A mean is known well enough if its interval reaches no further than this part of it.
_PRECISE = 0.1


def looks(sizes: Sequence[int], first: int | None) -> list[int]:
    """Return `sizes`, with halves of the smallest one before it, down to `first`; None adds none."""
    added = list(sizes)
    while first is not None and added[0] // 2 >= first:
        added.insert(0, added[0] // 2)
    return added


def undecided(best_first: Sequence[Trial], none: Trial, metric: Metric) -> list[Trial]:
    """Return the trials that may yet be the best choice, in the same order; none if no correction is."""
    if not best_first:
        return []
    leader = best_first[0]
    gain = _compared(none, leader, metric).value
    alive = []
    for trial in best_first:
        if _low(_compared(trial, none, metric)) > 0:
            continue
        if trial is not leader:
            worse_by = _low(_compared(trial, leader, metric))
            is_no_cheaper = trial.overhead >= leader.overhead
            if worse_by > 0 or (is_no_cheaper and gain > 0 and worse_by >= -NEXT_TO_NOTHING * gain):
                continue
        alive.append(trial)
    return alive


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
