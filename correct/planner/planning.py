"""`plan`: the search for the best plan within a budget."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import NoReturn

from tqdm import tqdm

from errata.correct.costs import Costs, measure_costs, overhead_of
from errata.correct.fitting import FitChoices, fit_forecast
from errata.correct.methods.fitted_forecast import FittedForecast
from errata.correct.methods.forecast import forecast_steps
from errata.correct.methods.sheet import Sheet
from errata.correct.pipeline import wrap
from errata.correct.planner.candidates import Candidate, cache_free_plan, candidates_for, with_sheets
from errata.correct.planner.expectation import Expectation
from errata.correct.planner.halving import (
    Trial,
    cheapest_of_the_best,
    extend,
    is_decided,
    is_promising,
    kept_of,
    looks,
    ranked,
    round_sizes,
    total_samples,
    undecided,
)
from errata.correct.planner.measuring import expectation, measure
from errata.correct.planner.metrics import AgreementMetric, FrechetMetric, Metric
from errata.correct.plans import Plan
from errata.correct.sampling import Inputs, PlanSampler, batches_of, default_inputs
from errata.correct.validation import check_plan_arguments
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.quality.reference import Reference

_log = logging.getLogger(__name__)

# Costs are measured, so a budget may be missed by their last digit only.
_ROUNDING = 1e-9

CACHE_FREE = "a cache-free run of the same artifact at its recorded steps"


def plan(
    deployed: DeployedPipeline,
    max_overhead: float = 0.15,
    reference: Reference | None = None,
    *,
    samples: int = 512,
    batch_size: int = 64,
    seed: int = 0,
    inputs: Inputs | None = None,
    candidates: Sequence[Candidate] | None = None,
    sheets: Sequence[Sheet] = (),
    progress: bool = True,
) -> Plan:
    """Return the plan that brings this artifact closest to the reference within a budget, as measured here.

    Candidates above the budget are not sampled. The others are compared from equal noise by successive
    halving, and one that is known to lose is sampled no further. The best one, or a cheaper one that cannot
    be told from it and loses next to nothing of its gain, is then measured again from noise that the search
    did not use. If it is not better than no correction there, the plan is `Plan.none()`; also if it was
    hardly better on the images that it was chosen by.

    Without a reference, quality is agreement with a cache-free run of the artifact at its recorded steps, for
    which it has activation scales. Such a run shows what caching costs, not what quantization costs, and
    an artifact without a cache would be compared with itself.

    For an artifact with a cache, a forecast is fitted first (`fit_forecast`), to images that neither the
    search nor the expectation uses.

    The costs of denoiser calls are measured first; with the same costs, the plan is the same.

    Args:
        deployed: a loaded artifact.
        max_overhead: the budget: extra time of denoiser calls, as a fraction of that of an uncorrected run;
            0.15 is 15 %. At most 5.
        reference: real images, by their features.
        samples: images for each finalist, at most; as many again, at most, are made to measure the best one.
        batch_size: images per batch; costs are measured at it.
        seed: of image 0; image i has the seed `seed + i`. The search uses images 0 to `samples - 1`, the
            expectation the `samples` that follow, a fitted forecast a few after those.
        inputs: the pipeline's keyword arguments for a batch of image indices, 0 to `2 * samples - 1`; None
            is right for pipelines that start from noise alone.
        candidates: what to choose from; None means `candidates_for(deployed.schedule, …)`.
        sheets: sheets of this artifact, which are tried as well.
        progress: whether to show a bar.

    Returns:
        A plan bound to this artifact, with `expected`.

    Raises:
        PlanError: an argument is out of range, or there is nothing to compare with.
    """
    check_plan_arguments(
        deployed, max_overhead=max_overhead, samples=samples, batch_size=batch_size, seed=seed
    )
    for sheet in sheets:
        sheet.check_artifact(deployed)
    # What is made small, and what calls cost here.
    used_inputs = default_inputs if inputs is None else inputs
    metric = _metric(deployed, reference, seed=seed, inputs=used_inputs)
    PlanSampler(deployed, Plan.none(), seed=seed, inputs=used_inputs).sample(range(1))  # shows the shape
    costs = measure_costs(deployed, batch_size=min(batch_size, samples))
    # What may be tried: methods that this artifact can use, within the budget.
    if candidates is None:
        fitted = _fitted(
            deployed, samples, batch_size, seed=seed + 2 * samples, inputs=used_inputs, progress=progress
        )
        offered = candidates_for(deployed.schedule, costs, max_overhead, fitted=fitted)
        candidates = _usable(offered, deployed)
    candidates = with_sheets(candidates, sheets)
    search = _Search(deployed, metric, costs, seed=seed, inputs=used_inputs, progress=progress)
    affordable = search.affordable(candidates, max_overhead)
    # Find the best one, then measure it anew.
    best, none = search.winner(affordable, samples=samples, batch_size=batch_size)
    return search.measured(best, none, samples=samples, batch_size=batch_size, tried=len(affordable) + 1)


class _Search:
    """The search: successive halving over candidates, then a measurement of the winner."""

    def __init__(
        self,
        deployed: DeployedPipeline,
        metric: Metric,
        costs: Costs,
        *,
        seed: int,
        inputs: Inputs,
        progress: bool,
    ) -> None:
        self._deployed, self._metric, self._costs = deployed, metric, costs
        self._seed, self._inputs, self._progress = seed, inputs, progress

    def affordable(self, candidates: Sequence[Candidate], max_overhead: float) -> list[Candidate]:
        """Return the candidates within the budget, in order, without those that correct nothing."""
        schedule = self._deployed.schedule
        kept = [c for c in candidates if not c.plan.corrects_nothing]
        kept = [c for c in kept if overhead_of(c.extra, schedule, self._costs) <= max_overhead + _ROUNDING]
        _log.info("%d of %d candidates are within %.1f %%", len(kept), len(candidates), 100 * max_overhead)
        return kept

    def winner(
        self, candidates: Sequence[Candidate], *, samples: int, batch_size: int
    ) -> tuple[Trial, Trial]:
        """Return the best candidate and no correction, by successive halving on images 0 to `samples - 1`.

        They are the same trial where no candidate is worth measuring again.
        """
        alive, none = [self._trial(candidate) for candidate in candidates], self._trial(Candidate.none())
        if not alive:
            return none, none
        metric, sizes = self._metric, round_sizes(len(alive), samples, least=self._metric.least)
        most, before = len(alive), 0
        with self._bar(total_samples(len(alive), sizes), "searching") as bar:
            for size in looks(sizes, metric.first_look):
                # Some metrics compare with all uncorrected images before they drop a half.
                if metric.projects and size in sizes[:-1] and none.samples < samples:
                    extend([none], metric, batches_of(samples, batch_size, first=before), bar=bar)
                # Sample as many more images as this look adds, rank, and keep those that may win; at the end
                # of a round, the better half.
                trials = [trial for trial in (none, *alive) if trial.samples < size]
                extend(trials, metric, batches_of(size, batch_size, first=before), bar=bar)
                alive, before = ranked(alive, none, metric), size
                self._log_round(alive, none)
                if size == samples:
                    break
                most = kept_of(most) if size in sizes else most
                if metric.first_look is not None and size >= metric.first_look:
                    alive = undecided(alive, none, metric, samples=samples)
                    if is_decided(alive, none, metric):
                        return (alive[0] if alive else none), none
                alive = alive[:most]
        # Of the finalists, no correction among them, take the cheapest of the best.
        best = cheapest_of_the_best(ranked([*alive, none], none, metric), none, metric)
        return (best if is_promising(best, none, metric) else none), none

    def measured(self, winner: Trial, searched: Trial, *, samples: int, batch_size: int, tried: int) -> Plan:
        """Return the winner's plan if it helps on the next `samples` images, else none; with expectation.

        `searched` is no correction in the search. Its images serve where no others were made: they played no
        part in what it does. Fewer images are made where more would hardly change the result.
        """
        none, first = searched, 0
        if winner is not searched:
            none, best, first = self._trial(Candidate.none()), self._trial(winner.candidate), samples
            self._measure(none, best, first=first, samples=samples, batch_size=batch_size)
            found = expectation(best, none, self._metric, seed=self._seed + first, tried=tried)
            if found.is_better:
                return self._bound(best, found)
            if none.samples < searched.samples:
                none, first = searched, 0
        self._measure(none, none, first=first, samples=samples, batch_size=batch_size)
        return self._bound(none, expectation(none, none, self._metric, seed=self._seed + first, tried=tried))

    def _measure(self, none: Trial, best: Trial, *, first: int, samples: int, batch_size: int) -> None:
        made = none.samples + (best.samples if best is not none else 0)
        with self._bar(samples * (1 if best is none else 2) - made, "measuring") as bar:
            measure(none, best, self._metric, first=first, samples=samples, batch_size=batch_size, bar=bar)

    def _bound(self, trial: Trial, found: Expectation) -> Plan:
        artifact = self._deployed.manifest.sha256
        return dataclasses.replace(trial.candidate.plan, artifact=artifact, expected=found)

    def _trial(self, candidate: Candidate) -> Trial:
        sampler = PlanSampler(self._deployed, candidate.plan, seed=self._seed, inputs=self._inputs)
        return Trial(candidate, sampler, self._deployed.schedule, self._costs)

    def _bar(self, total: int, doing: str) -> tqdm[NoReturn]:
        if not self._progress:
            return tqdm(total=total, disable=True)
        return tqdm(total=total, unit="image", desc=doing)  # the environment may disable it, too

    def _log_round(self, best_first: Sequence[Trial], none: Trial) -> None:
        if not _log.isEnabledFor(logging.INFO):
            return  # a distance in many features takes seconds
        for trial in [*best_first, none]:
            _log.info(
                "%5d images: %.5g at %.1f %% overhead: %s",
                trial.samples,
                self._metric.projected(trial.kept, none.kept),
                100 * trial.overhead,
                trial.candidate.name,
            )


def _metric(deployed: DeployedPipeline, reference: Reference | None, *, seed: int, inputs: Inputs) -> Metric:
    if reference is not None:
        return FrechetMetric(reference, seed=seed)
    if not deployed.schedule.has_cache:
        raise PlanError(
            "without a reference, plans are compared with a cache-free run of the same artifact, and this "
            "artifact has no cache; give real images, with `errata plan --reference DIR` or in Python as a "
            "Reference, such as Reference.from_folder(real_images, network)"
        )
    target = PlanSampler(deployed, cache_free_plan(), seed=seed, inputs=inputs)
    return AgreementMetric(target, reference=CACHE_FREE)


def _fitted(
    deployed: DeployedPipeline, samples: int, batch_size: int, *, seed: int, inputs: Inputs, progress: bool
) -> FittedForecast | None:
    """Return a forecast fitted to noise that neither the search nor the expectation uses."""
    if not forecast_steps(deployed.schedule):
        return None
    return fit_forecast(
        deployed,
        samples=min(samples, FitChoices().samples),
        batch_size=batch_size,
        seed=seed,
        inputs=inputs,
        progress=progress,
    )


def _usable(candidates: Sequence[Candidate], deployed: DeployedPipeline) -> list[Candidate]:
    """Return the candidates that work with this scheduler and find a step that they serve."""
    usable = []
    for candidate in candidates:
        try:
            wrap(deployed, candidate.plan)
        except PlanError as reason:
            _log.info("not tried: %s: %s", candidate.name, reason)
        else:
            usable.append(candidate)
    return usable
