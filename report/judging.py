"""Measurements of a row, summed up: distances with their intervals, denoiser calls, times."""

from __future__ import annotations

import statistics as summary
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from errata.quality.frechet import StatisticsAccumulator, frechet_distance, resampled_distances
from errata.quality.inception_score import resampled_inception_scores, streamed_inception_score
from errata.quality.intervals import Estimate
from errata.quality.kid import kernel_distance_parts
from errata.quality.measured import Measured
from errata.quality.precision_recall import NEIGHBOURS, precision_and_recall
from errata.report.grid import RowSpec
from errata.report.ledger import Target
from errata.report.measurements import FEATURES, LOGITS, Measurements
from errata.runtime.schedule import StepKind

# Kernel distance, precision and recall compare every image with every other; beyond so many, with the first.
MOST_COMPARED = 10_000
# Numbers of a block of pairs; 8 MB of float64.
_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """What a row's batches say beside their images; denoiser calls are per image.

    Attributes:
        sizes: images of each batch.
        seconds: of the pipeline call of each batch, wall-clock.
        took: of all batches, with everything that was measured.
        base: calls of the plain run, by kind.
        extra: calls that the correction added.
        cost: median over full batches of the seconds of one call, by kind.
        peak_bytes: highest memory during a batch.
        joules: energy per image, if every batch tells it.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    took: float
    base: Mapping[StepKind, float]
    extra: Mapping[StepKind, float]
    cost: Mapping[StepKind, float]
    peak_bytes: int | None
    joules: float | None

    @property
    def samples(self) -> int:
        """Number of images."""
        return sum(self.sizes)

    @property
    def batch_size(self) -> int:
        """Images of a full batch."""
        return max(self.sizes)

    @property
    def evaluations(self) -> dict[StepKind, float]:
        """All calls, by kind."""
        kinds = dict.fromkeys((*self.base, *self.extra))
        return {kind: self.base.get(kind, 0) + self.extra.get(kind, 0) for kind in kinds}

    @property
    def seconds_per_image(self) -> float:
        """Median over batches."""
        return summary.median(time / size for time, size in zip(self.seconds, self.sizes, strict=True))


def facts_of(measurements: Measurements, row: str) -> RowFacts:
    """Reads the facts of a row's batches.

    Raises:
        ReportError: a batch is missing or damaged.
    """
    batches, sizes = measurements.facts(row), tuple(map(len, measurements.batches))
    joules = [batch.joules for batch in batches]
    return RowFacts(
        sizes=sizes,
        seconds=tuple(batch.seconds for batch in batches),
        took=sum(batch.took for batch in batches),
        base=_per_image([batch.base for batch in batches], sizes),
        extra=_per_image([batch.extra for batch in batches], sizes),
        cost=_medians([batch.cost for batch, size in zip(batches, sizes, strict=True) if size == max(sizes)]),
        peak_bytes=max((batch.peak_bytes for batch in batches if batch.peak_bytes is not None), default=None),
        joules=None if None in joules else sum(each for each in joules if each is not None) / sum(sizes),
    )


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One row's measurements, summed up.

    Attributes:
        spec: the row.
        facts: its calls and times.
        frechet: its Fréchet distance to the reference.
        others: everything else that was measured, by name.
        changes: likewise, minus the same artifact's uncorrected run.
    """

    spec: RowSpec
    facts: RowFacts
    frechet: Measured
    others: Mapping[str, Estimate]
    changes: Mapping[str, Estimate]


class Judge:
    """Sums up rows one by one, in the order of a ledger: an artifact's uncorrected row comes first.

    Features are read from files in pieces, and of numbers of single images only those of the row that the
    next ones are compared with are kept, so memory does not grow with rows, and little with samples.

    Args:
        measurements: of all rows.
        target: what images are judged by.
        resamples: of every bootstrap.
        seed: of the resampling.
    """

    def __init__(self, measurements: Measurements, target: Target, *, resamples: int, seed: int) -> None:
        self.measurements, self.target = measurements, target
        self._resamples, self._seed = resamples, seed
        self._plain: tuple[str, dict[str, Measured]] = ("", {})

    def of(self, spec: RowSpec) -> Judged:
        """One row."""
        others = dict(self._others(spec))
        if spec.role in ("float", "uncorrected"):
            self._plain = (spec.artifact, others)
        artifact, plain = self._plain
        is_compared = artifact == spec.artifact and spec.role not in ("float", "uncorrected")
        return Judged(
            spec=spec,
            facts=facts_of(self.measurements, spec.directory),
            frechet=self._frechet(spec),
            others={name: value.estimate() for name, value in others.items()},
            changes={name: value.minus(plain[name]) for name, value in others.items() if name in plain}
            if is_compared
            else {},
        )

    def _frechet(self, spec: RowSpec) -> Measured:
        def chunks() -> Iterator[Tensor]:
            return self.measurements.chunks(spec.directory, FEATURES)

        accumulator = StatisticsAccumulator()
        for features in chunks():
            accumulator.add(features)
        distance = frechet_distance(accumulator.statistics(), self.target.statistics)
        replicates = resampled_distances(
            chunks,
            self.measurements.samples,
            self.target.statistics,
            resamples=self._resamples,
            seed=self._seed,
        )
        return Measured(distance, replicates=replicates)

    def _others(self, spec: RowSpec) -> Iterator[tuple[str, Measured]]:
        names = self.measurements.names(spec.directory)
        if self.target.real is not None:
            yield from self._compared(spec, self.target.real)
        if LOGITS in names:
            yield "inception_score", self._inception_score(spec)
        for name in sorted(names):
            if name.startswith("score."):
                scores = self.measurements.all_of(spec.directory, name)
                yield name.removeprefix("score."), Measured.mean(scores)

    def _compared(self, spec: RowSpec, real: Tensor) -> Iterator[tuple[str, Measured]]:
        features = self.measurements.all_of(spec.directory, FEATURES, most=MOST_COMPARED)
        block = max(1, _BLOCK // max(len(features), len(real)))
        yield "kid", Measured.mean(kernel_distance_parts(features, real, block=block))
        if min(len(features), len(real)) > NEIGHBOURS:
            precise, recalled = precision_and_recall(features, real, block=block)
            yield "precision", Measured.mean(precise)
            yield "recall", Measured.mean(recalled)

    def _inception_score(self, spec: RowSpec) -> Measured:
        def chunks() -> Iterator[Tensor]:
            return self.measurements.chunks(spec.directory, LOGITS)

        count = self.measurements.samples
        replicates = resampled_inception_scores(chunks, count, resamples=self._resamples, seed=self._seed)
        return Measured(streamed_inception_score(chunks()), replicates=replicates)


def _per_image(counted: Sequence[Mapping[StepKind, float]], sizes: Sequence[int]) -> dict[StepKind, float]:
    total: dict[StepKind, float] = {}
    for calls, images in zip(counted, sizes, strict=True):
        for kind, number in calls.items():
            total[kind] = total.get(kind, 0.0) + number * images
    return {kind: number / sum(sizes) for kind, number in total.items()}


def _medians(costs: Sequence[Mapping[StepKind, float]]) -> dict[StepKind, float]:
    kinds = dict.fromkeys(kind for cost in costs for kind in cost)
    return {kind: summary.median(cost[kind] for cost in costs if kind in cost) for kind in kinds}
