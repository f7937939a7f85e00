"""Tallies become rows: estimates, paired changes, overheads and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from errata.correct import Plan
from errata.correct.costs import Costs
from errata.quality.intervals import Estimate
from errata.quality.reference import Reference
from errata.report.results import FLOAT, Row
from errata.report.tally import Tally
from errata.report.verdict import verdict_of_corrected, verdict_of_float, verdict_of_uncorrected

Key = tuple[str, str]
"""Names of artifact and plan."""

FLOAT_KEY: Key = (FLOAT, "none")


def assemble_rows(
    tallies: Mapping[Key, Tally],
    plans: Mapping[str, Plan],
    costs: Mapping[str, Costs],
    reference: Reference,
    *,
    resamples: int,
    seed: int,
    plain_seconds: Mapping[Key, Sequence[float]] | None = None,
    same_steps: Mapping[Key, str] | None = None,
) -> tuple[Row, ...]:
    """One row per tally, in order; all hold the same seeds, and every artifact has its uncorrected tally.

    `plain_seconds` are those of uncorrected runs of each tally's first batches, where they were not taken by
    the uncorrected tally itself. `same_steps` names the earlier plan that a row's plan repeats.
    """
    assembly = _Assembly(tallies, reference, resamples=resamples, seed=seed, same_steps=same_steps or {})
    uncorrected = next(name for name, plan in plans.items() if plan.corrects_nothing)
    rows = []
    for key in tallies:
        artifact, plan = key
        if key == FLOAT_KEY:
            rows.append(assembly.float_row())
        elif plan == uncorrected:
            rows.append(assembly.uncorrected_row(key, costs[artifact]))
        else:
            plain = (artifact, uncorrected)
            seconds = tallies[plain].seconds if plain_seconds is None else plain_seconds[key]
            rows.append(assembly.corrected_row(key, plain, steps_of(plans[plan]), costs[artifact], seconds))
    return tuple(rows)


def steps_of(plan: Plan) -> str:
    """The steps expression of a plan; of one of several parts, all of theirs, joined with +."""
    return " + ".join(steps for _, steps in plan.parts)


class _Assembly:
    """What every row needs besides its own tally."""

    def __init__(
        self,
        tallies: Mapping[Key, Tally],
        reference: Reference,
        *,
        resamples: int,
        seed: int,
        same_steps: Mapping[Key, str],
    ) -> None:
        self._tallies = tallies
        self._target = reference.statistics
        self._resamples, self._seed = resamples, seed
        self._same_steps = same_steps

    def float_row(self) -> Row:
        tally = self._tallies[FLOAT_KEY]
        return Row(
            artifact=FLOAT,
            plan="none",
            steps="none",
            samples=tally.samples,
            evaluations=tally.evaluations,
            seconds_per_image=tally.seconds_per_image,
            frechet=tally.frechet(self._target, resamples=self._resamples, seed=self._seed),
            verdict=verdict_of_float(samples=tally.samples),
        )

    def uncorrected_row(self, key: Key, costs: Costs) -> Row:
        tally = self._tallies[key]
        change_to_float = self._change(tally, self._tallies.get(FLOAT_KEY))
        return Row(
            artifact=key[0],
            plan=key[1],
            steps="none",
            samples=tally.samples,
            evaluations=tally.evaluations,
            seconds_per_image=tally.seconds_per_image,
            frechet=tally.frechet(self._target, resamples=self._resamples, seed=self._seed),
            verdict=verdict_of_uncorrected(
                samples=tally.samples,
                change_to_float=change_to_float,
                dimension=self._target.dimension,
            ),
            overhead=tally.overhead(tally.seconds, costs),
            change_to_float=change_to_float,
            psnr=tally.mean_psnr,
        )

    def corrected_row(
        self, key: Key, plain_key: Key, steps: str, costs: Costs, plain_seconds: Sequence[float]
    ) -> Row:
        tally, plain = self._tallies[key], self._tallies[plain_key]
        frechet = tally.frechet(self._target, resamples=self._resamples, seed=self._seed)
        change = self._change(tally, plain)
        assert change is not None  # every artifact has its uncorrected tally
        overhead = tally.overhead(plain_seconds, costs)
        psnr_change = tally.psnr_change_from(plain)
        return Row(
            artifact=key[0],
            plan=key[1],
            steps=steps,
            samples=tally.samples,
            evaluations=tally.evaluations,
            seconds_per_image=tally.seconds_per_image,
            frechet=frechet,
            verdict=verdict_of_corrected(
                frechet=frechet.value,
                change=change,
                overhead=overhead.defined,
                samples=tally.samples,
                dimension=self._target.dimension,
                psnr_change=psnr_change,
                same_steps_as=self._same_steps.get(key),
            ),
            overhead=overhead,
            change=change,
            change_to_float=self._change(tally, self._tallies.get(FLOAT_KEY)),
            psnr=tally.mean_psnr,
            psnr_change=psnr_change,
            same_steps_as=self._same_steps.get(key),
        )

    def _change(self, tally: Tally, other: Tally | None) -> Estimate | None:
        if other is None:
            return None
        return tally.change_from(other, self._target, resamples=self._resamples, seed=self._seed)
