"""One candidate while it is tried: its sampler, and what is kept of its images."""

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
from errata.runtime.schedule import CacheSchedule, StepKind

# Counts of evaluations are means over batches, in floating point.
_ROUNDING = 1e-6


class Trial:
    """A candidate, and what its images came to so far; memory grows by what the metric keeps of an image.

    Attributes:
        candidate: what is tried.
        overhead: predicted, as a fraction.
        samples: images so far; they have the indices from the first one on.
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
        """Take in a batch.

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
        """By the evaluations that were made."""
        taken: Mapping[StepKind, float] = {k: n / self.samples for k, n in self._evaluations.items()}
        plain = price(self._plain, self._costs)
        return (price(taken, self._costs) - plain) / plain


def extend(trials: Sequence[Trial], metric: Metric, batches: Sequence[range], *, bar: tqdm[NoReturn]) -> None:
    """Samples these batches under every trial, from equal noise."""
    for batch in batches:
        score = metric.against(batch)
        for trial in trials:
            trial.add(trial.sampler.sample(batch), score)
            bar.update(len(batch))
