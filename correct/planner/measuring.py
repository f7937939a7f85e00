"""The measurement of what a search found, from noise that it did not use."""

from __future__ import annotations

from typing import NoReturn

from tqdm import tqdm

from errata.correct.planner.expectation import Expectation
from errata.correct.planner.halving import Trial, extend, is_better_so_far, is_precise, looks
from errata.correct.planner.metrics import Metric
from errata.correct.sampling import batches_of
from errata.quality.intervals import CONFIDENCE

# Images that the best candidate is measured on, at least; as many as `samples`, if that is fewer.
_LEAST_MEASURED = 64


def measure(
    none: Trial,
    best: Trial,
    metric: Metric,
    *,
    first: int,
    samples: int,
    batch_size: int,
    bar: tqdm[NoReturn],
) -> None:
    """Sample both from image `first` on, after those that they have, up to `samples` images each.

    Fewer images are made where more would hardly change the result, and where half of them show no gain.
    `best` is `none` where no correction is measured alone.
    """
    trials = list(dict.fromkeys((none, best)))
    for size in looks([samples], _first_look(metric, samples, is_pair=best is not none)):
        if size > none.samples:
            extend(trials, metric, batches_of(first + size, batch_size, first=first + none.samples), bar=bar)
        if size < samples and _is_settled(none, best, metric, samples=samples):
            break


def expectation(best: Trial, none: Trial, metric: Metric, *, seed: int, tried: int) -> Expectation:
    """Return what the images of both say. `seed` is that of the first one, `tried` counts the candidates."""
    measured = metric.estimate(best.kept)
    change = metric.change(best.kept, none.kept)
    return Expectation(
        metric=metric.name,
        value=measured.value,
        low=measured.interval.low,
        high=measured.interval.high,
        uncorrected=metric.value(none.kept),
        change=change.value,
        change_low=change.interval.low,
        change_high=change.interval.high,
        overhead=best.measured_overhead,
        samples=best.samples,
        seed=seed,
        candidates_tried=tried,
        reference=metric.reference,
        confidence=CONFIDENCE,
    )


def _first_look(metric: Metric, samples: int, *, is_pair: bool) -> int | None:
    """Return with how many images a measurement may end; None if it needs all of them."""
    if not metric.projects:
        return _LEAST_MEASURED
    # A distance depends on the number of images, so only a pair without a gain ends early.
    return max(metric.first_look, samples // 2) if is_pair and metric.first_look is not None else None


def _is_settled(none: Trial, best: Trial, metric: Metric, *, samples: int) -> bool:
    if best is none:
        return is_precise(metric.estimate(none.kept))
    if not is_better_so_far(best, none, metric, samples=samples):
        return True
    return not metric.projects and is_precise(metric.change(best.kept, none.kept))
