"""The measurements of a row, summarized: every metric with its interval, denoiser calls, times."""

from __future__ import annotations

import statistics as summary
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from errata.quality.intervals import Estimate, Measured
from errata.quality.metric import HEADLINE, Metric, SampleSet, known_metrics
from errata.report.report_index import RowSpec, Target
from errata.report.store import FEATURES, LOGITS, SCORE, MeasurementStore
from errata.runtime.schedule import StepKind


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """What a row's batches tell beside their images; denoiser calls are per image.

    Attributes:
        sizes: images of each batch.
        seconds: of the pipeline call of each batch, wall-clock.
        took: of all batches, with everything that was measured.
        base: calls of the plain run, by kind.
        extra: calls that the correction added.
        cost: median over full batches of the seconds of one call, by kind.
        peak_bytes: peak memory during a batch.
        joules: energy per image, if every batch has it.
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
        """All denoiser calls, by kind."""
        kinds = dict.fromkeys((*self.base, *self.extra))
        return {kind: self.base.get(kind, 0) + self.extra.get(kind, 0) for kind in kinds}

    @property
    def seconds_per_image(self) -> float:
        """Median over batches, wall-clock."""
        return summary.median(time / size for time, size in zip(self.seconds, self.sizes, strict=True))


def facts_of(store: MeasurementStore, row: str) -> RowFacts:
    """Return the facts of a row's batches.

    Raises:
        ReportError: a batch is missing or damaged.
    """
    batches, sizes = store.facts(row), tuple(map(len, store.batches))
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
class RowSummary:
    """One row's measurements, summarized.

    Attributes:
        spec: the row.
        facts: its calls and times.
        frechet: its Fréchet distance to the reference.
        metrics: all other metrics, by name.
        changes: the same, minus the same artifact's uncorrected run.
    """

    spec: RowSpec
    facts: RowFacts
    frechet: Measured
    metrics: Mapping[str, Estimate]
    changes: Mapping[str, Estimate]


class RowSummarizer:
    """Summarizes rows one by one, in the order of an index: an artifact's uncorrected row comes first.

    Features are read in pieces, and of numbers of single images only those of the row that the next ones are
    compared with are kept, so memory does not grow with rows, and little with samples.

    Args:
        store: the measurements of all rows.
        target: what images are compared with.
        resamples: of every bootstrap.
        seed: of the resampling.
        metrics: metrics of sets beside the standard ones.
    """

    def __init__(
        self,
        store: MeasurementStore,
        target: Target,
        *,
        resamples: int,
        seed: int,
        metrics: Sequence[Metric] = (),
    ) -> None:
        self.store, self.target = store, target
        self._resamples, self._seed = resamples, seed
        self._metrics = (*known_metrics(), *metrics)
        self._plain: tuple[str, dict[str, Measured]] = ("", {})

    def of(self, spec: RowSpec) -> RowSummary:
        """Return the summary of one row."""
        measured = dict(self._measured(spec))
        frechet = measured.pop(HEADLINE)
        is_plain = spec.role in ("float", "uncorrected")
        if is_plain:
            self._plain = (spec.artifact, measured)
        artifact, plain = self._plain
        compared = {} if is_plain or artifact != spec.artifact else plain
        return RowSummary(
            spec=spec,
            facts=facts_of(self.store, spec.directory),
            frechet=frechet,
            metrics={name: value.estimate() for name, value in measured.items()},
            changes={
                name: value.minus(compared[name]) for name, value in measured.items() if name in compared
            },
        )

    def _measured(self, spec: RowSpec) -> Iterator[tuple[str, Measured]]:
        row = spec.directory
        names = self.store.names(row)
        for name in sorted(names):
            if name.startswith(SCORE):
                yield name.removeprefix(SCORE), Measured.mean(self.store.all_of(row, name))
        samples = SampleSet(
            features=partial(self.store.chunks, row, FEATURES),
            logits=partial(self.store.chunks, row, LOGITS) if LOGITS in names else None,
            count=self.store.samples,
            reference=self.target.statistics,
            real=self.target.real,
            resamples=self._resamples,
            seed=self._seed,
        )
        for metric in self._metrics:
            if metric.is_served_by(samples) and metric.compute is not None:
                value = metric.compute(samples)
                if value is not None:
                    yield metric.name, value


def _per_image(counted: Sequence[Mapping[StepKind, float]], sizes: Sequence[int]) -> dict[StepKind, float]:
    total: dict[StepKind, float] = {}
    for calls, images in zip(counted, sizes, strict=True):
        for kind, number in calls.items():
            total[kind] = total.get(kind, 0.0) + number * images
    return {kind: number / sum(sizes) for kind, number in total.items()}


def _medians(costs: Sequence[Mapping[StepKind, float]]) -> dict[StepKind, float]:
    kinds = dict.fromkeys(kind for cost in costs for kind in cost)
    return {kind: summary.median(cost[kind] for cost in costs if kind in cost) for kind in kinds}
