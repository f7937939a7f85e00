"""Measurements become rows: estimates, paired differences, overheads, rivals and verdicts."""

from __future__ import annotations

import statistics as summary
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from errata.compress.recipes.schedule import StepKind
from errata.correct import Plan
from errata.correct.costs import price
from errata.quality.frechet import (
    FeatureStatistics,
    StatisticsAccumulator,
    frechet_distance,
    resampled_distances,
)
from errata.quality.inception_score import resampled_inception_scores, streamed_inception_score
from errata.quality.intervals import CONFIDENCE, Estimate
from errata.quality.kernel import kernel_distance_parts
from errata.quality.manifold import NEIGHBOURS, precision_and_recall
from errata.quality.measured import Measured
from errata.report.equal_compute import TOLERANCE
from errata.report.grid import Key, RowSpec
from errata.report.ledger import Ledger, Target
from errata.report.measurements import FEATURES, LOGITS, BatchFacts, Measurements
from errata.report.pareto import fronts
from errata.report.results import FLOAT, Overhead, RivalResult, Row
from errata.report.verdict import (
    Verdict,
    verdict_of_corrected,
    verdict_of_float,
    verdict_of_rival,
    verdict_of_uncorrected,
)

# Kernel distance, precision and recall compare every image with every other; beyond so many, with the first.
MOST_COMPARED = 10_000
# Numbers of a block of pairs; 32 MB of float64.
_BLOCK = 2**22


@dataclass(frozen=True)
class Judged:
    """One row's measurements, summed up."""

    spec: RowSpec
    facts: Sequence[BatchFacts]
    frechet: Measured
    others: Mapping[str, Measured]

    @property
    def samples(self) -> int:
        """Number of images."""
        return sum(batch.count for batch in self.facts)

    def calls(self, which: str) -> dict[StepKind, float]:
        """Denoiser calls per image, "base" or "extra", by kind."""
        total: dict[StepKind, float] = {}
        for batch in self.facts:
            for kind, number in getattr(batch, which).items():
                total[kind] = total.get(kind, 0.0) + number * batch.count
        return {kind: number / self.samples for kind, number in total.items()}

    @property
    def evaluations(self) -> dict[StepKind, float]:
        """Denoiser calls per image, by kind."""
        base, extra = self.calls("base"), self.calls("extra")
        return {kind: base.get(kind, 0) + extra.get(kind, 0) for kind in dict.fromkeys((*base, *extra))}

    @property
    def cost(self) -> dict[StepKind, float]:
        """Median seconds of one call, by kind."""
        return cost_of(self.facts)

    @property
    def seconds_per_image(self) -> float:
        """Median over batches, wall-clock."""
        return summary.median(batch.seconds / batch.count for batch in self.facts)

    @property
    def peak_bytes(self) -> int | None:
        """Highest memory during a batch."""
        return max((batch.peak_bytes for batch in self.facts if batch.peak_bytes is not None), default=None)

    @property
    def joules_per_image(self) -> float | None:
        """Mean energy, where it is known of every batch."""
        known = [batch.joules for batch in self.facts if batch.joules is not None]
        return sum(known) / self.samples if len(known) == len(self.facts) else None


@dataclass
class Judge:
    """Sums up rows one by one; a row's features are read from its files in pieces."""

    measurements: Measurements
    target: Target
    resamples: int
    seed: int

    def of(self, spec: RowSpec) -> Judged:
        """One row."""
        return Judged(
            spec=spec,
            facts=self.measurements.facts(spec.directory),
            frechet=self._frechet(spec),
            others=dict(self._others(spec)),
        )

    def seconds_taken(self, specs: Sequence[RowSpec]) -> float:
        """What sampling and measuring these rows took, in all processes together."""
        return sum(batch.took for spec in specs for batch in self.measurements.facts(spec.directory))

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
            resamples=self.resamples,
            seed=self.seed,
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
        replicates = resampled_inception_scores(chunks, count, resamples=self.resamples, seed=self.seed)
        return Measured(streamed_inception_score(chunks()), replicates=replicates)


def assemble_rows(ledger: Ledger, judge: Judge) -> tuple[Row, ...]:
    """Every row of a ledger whose measurements are complete, in order.

    Raises:
        ReportError: a batch is missing or damaged.
    """
    judged = {spec.key: judge.of(spec) for spec in ledger.rows}
    return _Assembly(judged, ledger, judge.target.statistics).rows()


def costs_of(ledger: Ledger, judge: Judge) -> dict[str, dict[str, float]]:
    """By artifact, median seconds of a denoiser call of each kind, for a whole batch, in uncorrected runs."""
    plain = [spec for spec in ledger.rows if spec.role in ("uncorrected", "float")]
    return {
        spec.artifact: {
            str(kind): seconds for kind, seconds in cost_of(judge.measurements.facts(spec.directory)).items()
        }
        for spec in plain
    }


def cost_of(facts: Sequence[BatchFacts]) -> dict[StepKind, float]:
    """Median over full batches of the seconds of one call, by kind."""
    size = max(batch.count for batch in facts)
    found: dict[StepKind, list[float]] = {}
    for batch in facts:
        if batch.count == size:
            for kind, seconds in batch.cost.items():
                found.setdefault(kind, []).append(seconds)
    return {kind: summary.median(seconds) for kind, seconds in found.items()}


class _Assembly:
    """What every row needs besides its own measurements."""

    def __init__(self, judged: Mapping[Key, Judged], ledger: Ledger, target: FeatureStatistics) -> None:
        self._judged = judged
        self._dimension = target.dimension
        self._repeats = {(artifact, plan): same for artifact, plan, same in ledger.repeats}
        self._plain = {
            spec.artifact: judged[spec.key] for spec in ledger.rows if spec.role in ("uncorrected", "float")
        }
        self._has_rivals = any(spec.role == "equal compute" for spec in ledger.rows)
        self._costs = {artifact: plain.cost for artifact, plain in self._plain.items()}

    def rows(self) -> tuple[Row, ...]:
        front = fronts({key: (self._compute(each), each.frechet) for key, each in self._judged.items()})
        return tuple(replace(self._row(each), front=front[key]) for key, each in self._judged.items())

    def _row(self, judged: Judged) -> Row:
        spec, plain = judged.spec, self._plain.get(judged.spec.artifact)
        is_plain = spec.role in ("float", "uncorrected")
        compared = None if is_plain or spec.artifact == FLOAT else plain
        row = Row(
            artifact=spec.artifact,
            plan=spec.plan_name,
            role=spec.role,
            stands_for=spec.stands_for,
            steps="none" if spec.plan is None or is_plain else steps_of(spec.plan),
            sampling_steps=spec.steps,
            samples=judged.samples,
            evaluations={str(kind): number for kind, number in judged.evaluations.items()},
            compute=self._compute(judged),
            seconds_per_image=judged.seconds_per_image,
            frechet=judged.frechet.estimate(),
            verdict=Verdict("uncorrected", ""),
            overhead=None if spec.artifact == FLOAT or plain is None else self._overhead(judged, plain),
            change=_minus(judged, compared),
            change_to_float=None if spec.artifact == FLOAT else _minus(judged, self._plain.get(FLOAT)),
            psnr=_other(judged, "psnr"),
            psnr_change=_other_minus(judged, compared, "psnr"),
            metrics={name: value.estimate() for name, value in judged.others.items() if name != "psnr"},
            changes=_changes(judged, compared),
            rivals=self._rivals(judged) if spec.role == "plan" else (),
            peak_bytes=judged.peak_bytes,
            joules_per_image=judged.joules_per_image,
            same_steps_as=self._repeats.get(spec.key),
        )
        return replace(row, verdict=self._verdict(row, judged))

    def _compute(self, judged: Judged) -> float:
        """Seconds per image of its denoiser calls; a batch's seconds are shared by its images."""
        costs = self._costs.get(judged.spec.artifact) or judged.cost
        return price(judged.evaluations, costs) / max(batch.count for batch in judged.facts)

    def _overhead(self, judged: Judged, plain: Judged) -> Overhead:
        ratios = [
            mine.seconds / theirs.seconds - 1 for mine, theirs in zip(judged.facts, plain.facts, strict=True)
        ]
        low, middle, high = (
            summary.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        return Overhead(
            defined=self._compute(judged) / self._compute(plain) - 1,
            measured=middle,
            spread=(low, high),
            batches=len(ratios),
        )

    def _rivals(self, judged: Judged) -> tuple[RivalResult, ...]:
        """Other rows of the artifact, and of the float model, that cost no more."""
        own = self._compute(judged)
        found = []
        for key, other in self._judged.items():
            is_candidate = other.spec.artifact in (judged.spec.artifact, FLOAT) and other.spec.role != "float"
            share = self._compute(other) / own
            if key == judged.spec.key or not is_candidate or share > TOLERANCE or key in self._repeats:
                continue
            if other.spec.role == "plan" and self._repeats.get(judged.spec.key) == other.spec.plan_name:
                continue
            found.append(
                RivalResult(
                    artifact=other.spec.artifact,
                    plan=other.spec.plan_name,
                    compute=share,
                    difference=judged.frechet.minus(other.frechet),
                )
            )
        return tuple(found)

    def _verdict(self, row: Row, judged: Judged) -> Verdict:
        if row.role == "float":
            return verdict_of_float(samples=row.samples)
        if row.role == "uncorrected":
            return verdict_of_uncorrected(
                samples=row.samples, change_to_float=row.change_to_float, dimension=self._dimension
            )
        if row.role == "equal compute":
            return verdict_of_rival(row.stands_for)
        assert row.change is not None  # a plan's row
        assert row.overhead is not None
        return verdict_of_corrected(
            frechet=row.frechet.value,
            change=row.change,
            overhead=row.overhead.defined,
            samples=row.samples,
            dimension=self._dimension,
            psnr_change=row.psnr_change,
            same_steps_as=row.same_steps_as,
            rivals=self._named_rivals(row, judged),
        )

    def _named_rivals(self, row: Row, judged: Judged) -> list[tuple[str, Estimate, Estimate]]:
        """Rivals of the same artifact: what each is, the difference, and that at joint confidence.

        None where rows of equal compute were not asked for: then nobody knows what pays.
        """
        if not self._has_rivals:
            return []
        own = [rival for rival in row.rivals if rival.artifact == row.artifact]
        confidence = joint_confidence(len(own))
        named = []
        for rival in own:
            other = self._judged[rival.artifact, rival.plan]
            joint = judged.frechet.minus(other.frechet, confidence=confidence)
            if other.spec.role != "uncorrected":
                named.append((other.spec.stands_for or rival.plan, rival.difference, joint))
        return named


def joint_confidence(comparisons: int) -> float:
    """Confidence of each of several intervals that all hold at once with `CONFIDENCE` (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, comparisons)


def steps_of(plan: Plan) -> str:
    """The steps expression of a plan; of one of several parts, all of theirs, joined with +."""
    return " + ".join(steps for _, steps in plan.parts)


def _minus(judged: Judged, other: Judged | None) -> Estimate | None:
    return None if other is None else judged.frechet.minus(other.frechet)


def _other(judged: Judged, name: str) -> Estimate | None:
    return judged.others[name].estimate() if name in judged.others else None


def _other_minus(judged: Judged, other: Judged | None, name: str) -> Estimate | None:
    if other is None or name not in judged.others or name not in other.others:
        return None
    return judged.others[name].minus(other.others[name])


def _changes(judged: Judged, other: Judged | None) -> dict[str, Estimate]:
    changes = {name: _other_minus(judged, other, name) for name in judged.others if name != "psnr"}
    return {name: change for name, change in changes.items() if change is not None}
