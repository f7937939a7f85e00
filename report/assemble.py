"""Summaries become the rows of a report: paired differences, overheads, alternatives, front and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from tqdm import tqdm

from errata.correct import Plan
from errata.correct.costs import price
from errata.quality.intervals import CONFIDENCE, Estimate, Measured
from errata.report.compute_matched import TOLERANCE
from errata.report.report_index import Key, ReportIndex
from errata.report.results import FLOAT, ComputeMatchedResult, Front, Overhead, Row
from errata.report.summarize import RowSummarizer, RowSummary
from errata.report.verdict import (
    Verdict,
    verdict_of_alternative,
    verdict_of_corrected,
    verdict_of_float,
    verdict_of_uncorrected,
)

Name = TypeVar("Name", bound=Hashable)

# Quartiles of wall-clock ratios on a quiet machine lie a few per cent apart; ten mean that something else
# was running.
_CALM_SPREAD = 0.10


def summarize_rows(index: ReportIndex, summarizer: RowSummarizer) -> dict[Key, RowSummary]:
    """Return the summary of every row of an index, in order; their measurements must be complete.

    Raises:
        ReportError: a batch is missing or damaged.
    """
    bar = tqdm(index.rows, unit="row", desc="summarizing", leave=False)
    return {spec.key: summarizer.of(spec) for spec in bar}


def assemble_rows(
    summaries: Mapping[Key, RowSummary], index: ReportIndex, *, dimension: int
) -> tuple[Row, ...]:
    """Return the rows of a report, in order; dimension: number of features."""
    return _Assembly(summaries, index, dimension).rows()


def costs_of(rows: Mapping[Key, RowSummary]) -> dict[str, dict[str, float]]:
    """Return, by artifact, median seconds of each kind of denoiser call, for a batch, uncorrected."""
    return {
        each.spec.artifact: {str(kind): seconds for kind, seconds in each.facts.cost.items()}
        for each in rows.values()
        if each.spec.role in ("uncorrected", "float")
    }


class _Assembly:
    """What every row needs besides its own measurements."""

    def __init__(self, summaries: Mapping[Key, RowSummary], index: ReportIndex, dimension: int) -> None:
        self._summaries = summaries
        self._dimension = dimension
        self._repeats = {(artifact, plan): same for artifact, plan, same in index.repeats}
        self._plain = {
            spec.artifact: summaries[spec.key] for spec in index.rows if spec.role in ("uncorrected", "float")
        }
        self._has_alternatives = any(spec.role == "equal compute" for spec in index.rows)
        self._costs = {artifact: plain.facts.cost for artifact, plain in self._plain.items()}

    def rows(self) -> tuple[Row, ...]:
        front = fronts({key: (self._compute(each), each.frechet) for key, each in self._summaries.items()})
        return tuple(self._judged(each, front[key]) for key, each in self._summaries.items())

    def _judged(self, summary: RowSummary, front: Front) -> Row:
        row = self._row(summary)
        return replace(row, front=front, verdict=self._verdict(row, summary))

    def _row(self, summary: RowSummary) -> Row:
        spec, plain = summary.spec, self._plain.get(summary.spec.artifact)
        is_plain, is_float = spec.role in ("float", "uncorrected"), spec.artifact == FLOAT
        facts = summary.facts
        return Row(
            artifact=spec.artifact,
            plan=spec.plan_name,
            role=spec.role,
            stands_for=spec.stands_for,
            steps="none" if spec.plan is None or is_plain else steps_of(spec.plan),
            sampling_steps=spec.steps,
            samples=facts.samples,
            evaluations={str(kind): number for kind, number in facts.evaluations.items()},
            compute=self._compute(summary),
            seconds_per_image=facts.seconds_per_image,
            frechet=summary.frechet.estimate(),
            verdict=Verdict("uncorrected", ""),
            overhead=None if is_float or plain is None else self._overhead(summary, plain),
            change=_minus(summary, None if is_plain or is_float else plain),
            change_to_float=None if is_float else _minus(summary, self._plain.get(FLOAT)),
            metrics=summary.metrics,
            changes=summary.changes,
            alternatives=self._alternatives(summary) if spec.role == "plan" else (),
            peak_bytes=facts.peak_bytes,
            joules_per_image=facts.joules,
            same_steps_as=self._repeats.get(spec.key),
        )

    def _compute(self, summary: RowSummary) -> float:
        """Return seconds of denoiser calls per image; a batch's seconds are shared by its images."""
        costs = self._costs.get(summary.spec.artifact) or summary.facts.cost
        return price(summary.facts.evaluations, costs) / summary.facts.batch_size

    def _overhead(self, summary: RowSummary, plain: RowSummary) -> Overhead:
        ratios = [
            mine / theirs - 1 for mine, theirs in zip(summary.facts.seconds, plain.facts.seconds, strict=True)
        ]
        low, middle, high = (
            statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        )
        return Overhead(
            defined=self._compute(summary) / self._compute(plain) - 1,
            measured=middle,
            spread=(low, high),
            batches=len(ratios),
        )

    def _alternatives(self, summary: RowSummary) -> tuple[ComputeMatchedResult, ...]:
        """Return other rows of the artifact, and of the float model, that cost no more."""
        own = self._compute(summary)
        found = []
        for key, other in self._summaries.items():
            is_candidate = (
                other.spec.artifact in (summary.spec.artifact, FLOAT) and other.spec.role != "float"
            )
            share = self._compute(other) / own
            if key == summary.spec.key or not is_candidate or share > TOLERANCE or key in self._repeats:
                continue
            if other.spec.role == "plan" and self._repeats.get(summary.spec.key) == other.spec.plan_name:
                continue
            found.append(
                ComputeMatchedResult(
                    artifact=other.spec.artifact,
                    plan=other.spec.plan_name,
                    compute=share,
                    difference=summary.frechet.minus(other.frechet),
                )
            )
        return tuple(found)

    def _verdict(self, row: Row, summary: RowSummary) -> Verdict:
        if row.role == "float":
            return verdict_of_float(samples=row.samples)
        if row.role == "uncorrected":
            return verdict_of_uncorrected(
                samples=row.samples, change_to_float=row.change_to_float, dimension=self._dimension
            )
        if row.role == "equal compute":
            return verdict_of_alternative(row.stands_for)
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
            alternatives=self._named_alternatives(row, summary),
        )

    def _named_alternatives(self, row: Row, summary: RowSummary) -> list[tuple[str, Estimate, Estimate]]:
        """Return alternatives on the same artifact: name, difference, and difference at joint confidence.

        Empty if alternatives were not asked for: then nothing tells whether a plan pays.
        """
        if not self._has_alternatives:
            return []
        own = [each for each in row.alternatives if each.artifact == row.artifact]
        confidence = joint_confidence(len(own))
        named = []
        for each in own:
            other = self._summaries[each.artifact, each.plan]
            joint = summary.frechet.minus(other.frechet, confidence=confidence)
            if other.spec.role != "uncorrected":
                named.append((other.spec.stands_for or each.plan, each.difference, joint))
        return named


def joint_confidence(comparisons: int) -> float:
    """Return the confidence of each of several intervals that hold jointly with `CONFIDENCE` (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, comparisons)


def steps_of(plan: Plan) -> str:
    """Return the steps expression of a plan; those of several parts are joined with +."""
    return " + ".join(steps for _, steps in plan.parts)


def _minus(summary: RowSummary, other: RowSummary | None) -> Estimate | None:
    return None if other is None else summary.frechet.minus(other.frechet)


def fronts(points: Mapping[Name, tuple[float, Measured]]) -> dict[Name, Front]:
    """Return where each point of compute and distance (lower is better) lies with regard to the Pareto front.

    "on": no other point is as good in both and better in one. "near": some are, but none by a significant
    difference of distance. "off": some are, by a significant difference.
    """
    return {name: _place(name, points) for name in points}


def _place(name: Name, points: Mapping[Name, tuple[float, Measured]]) -> Front:
    compute, distance = points[name]
    dominating = [
        other
        for key, (cost, other) in points.items()
        if key != name and _dominates((cost, other.value), (compute, distance.value))
    ]
    if not dominating:
        return "on"
    is_significant = any(distance.minus(other).interval.low > 0 for other in dominating)
    return "off" if is_significant else "near"


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def scatter_notes(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return a note if wall-clock times scatter so much that the measured overheads mean little."""
    scattered = [
        f"{row.artifact}, {row.plan}"
        for row in rows
        if row.overhead is not None and _relative_spread(row.overhead) > _CALM_SPREAD
    ]
    if not scattered:
        return ()
    return (
        f"The machine was busy: the measured overhead of {'; '.join(scattered)} varies by more than "
        f"{_CALM_SPREAD:.0%} of the run between batches. Use the overhead from denoiser calls there.",
    )


def _relative_spread(overhead: Overhead) -> float:
    low, high = overhead.spread
    return (high - low) / (1 + overhead.measured)
