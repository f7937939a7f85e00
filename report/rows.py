"""Judged rows become results: paired differences, overheads, rivals and verdicts."""

from __future__ import annotations

import statistics as summary
from collections.abc import Mapping
from dataclasses import replace

from tqdm import tqdm

from errata.correct import Plan
from errata.correct.costs import price
from errata.quality.intervals import CONFIDENCE, Estimate
from errata.report.equal_compute import TOLERANCE
from errata.report.grid import Key
from errata.report.judging import Judge, Judged
from errata.report.ledger import Ledger
from errata.report.pareto import fronts
from errata.report.results import FLOAT, Overhead, RivalResult, Row
from errata.report.verdict import (
    Verdict,
    verdict_of_corrected,
    verdict_of_float,
    verdict_of_rival,
    verdict_of_uncorrected,
)


def judged_rows(ledger: Ledger, judge: Judge) -> dict[Key, Judged]:
    """Every row of a ledger, whose measurements must be complete, in order.

    Raises:
        ReportError: a batch is missing or damaged.
    """
    return {spec.key: judge.of(spec) for spec in tqdm(ledger.rows, unit="row", desc="judging", leave=False)}


def assemble_rows(judged: Mapping[Key, Judged], ledger: Ledger, *, dimension: int) -> tuple[Row, ...]:
    """Results of the rows, in order; dimension: number of features."""
    return _Assembly(judged, ledger, dimension).rows()


def costs_of(rows: Mapping[Key, Judged]) -> dict[str, dict[str, float]]:
    """By artifact, median seconds of a denoiser call of each kind, for a whole batch, in uncorrected runs."""
    return {
        judged.spec.artifact: {str(kind): seconds for kind, seconds in judged.facts.cost.items()}
        for judged in rows.values()
        if judged.spec.role in ("uncorrected", "float")
    }


class _Assembly:
    """What every row needs besides its own measurements."""

    def __init__(self, judged: Mapping[Key, Judged], ledger: Ledger, dimension: int) -> None:
        self._judged = judged
        self._dimension = dimension
        self._repeats = {(artifact, plan): same for artifact, plan, same in ledger.repeats}
        self._plain = {
            spec.artifact: judged[spec.key] for spec in ledger.rows if spec.role in ("uncorrected", "float")
        }
        self._has_rivals = any(spec.role == "equal compute" for spec in ledger.rows)
        self._costs = {artifact: plain.facts.cost for artifact, plain in self._plain.items()}

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
            samples=judged.facts.samples,
            evaluations={str(kind): number for kind, number in judged.facts.evaluations.items()},
            compute=self._compute(judged),
            seconds_per_image=judged.facts.seconds_per_image,
            frechet=judged.frechet.estimate(),
            verdict=Verdict("uncorrected", ""),
            overhead=None if spec.artifact == FLOAT or plain is None else self._overhead(judged, plain),
            change=_minus(judged, compared),
            change_to_float=None if spec.artifact == FLOAT else _minus(judged, self._plain.get(FLOAT)),
            psnr=judged.others.get("psnr"),
            psnr_change=judged.changes.get("psnr"),
            metrics={name: value for name, value in judged.others.items() if name != "psnr"},
            changes={name: change for name, change in judged.changes.items() if name != "psnr"},
            rivals=self._rivals(judged) if spec.role == "plan" else (),
            peak_bytes=judged.facts.peak_bytes,
            joules_per_image=judged.facts.joules,
            same_steps_as=self._repeats.get(spec.key),
        )
        return replace(row, verdict=self._verdict(row, judged))

    def _compute(self, judged: Judged) -> float:
        """Seconds per image of its denoiser calls; a batch's seconds are shared by its images."""
        costs = self._costs.get(judged.spec.artifact) or judged.facts.cost
        return price(judged.facts.evaluations, costs) / judged.facts.batch_size

    def _overhead(self, judged: Judged, plain: Judged) -> Overhead:
        ratios = [
            mine / theirs - 1 for mine, theirs in zip(judged.facts.seconds, plain.facts.seconds, strict=True)
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
