"""The first batch of a report and what follows from it: costs, alternatives, expected time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from errata.correct.costs import Costs, price
from errata.deploy import DeployedPipeline
from errata.quality.metric import Metric
from errata.quality.reference import Reference
from errata.report.compute_matched import ComputeMatched, alternatives_of, float_steps
from errata.report.estimation import early_text, warm_up
from errata.report.growth import amplified_at, growth_of
from errata.report.protocol import (
    Protocol,
    exception_notes,
    kernels_of,
    make_protocol,
    missing_notes,
    size_of,
)
from errata.report.report_index import FILE, ReportIndex, RowSpec, Target, artifact_row, repeats
from errata.report.request import ReportRequest
from errata.report.results import FLOAT, UNCORRECTED
from errata.report.sampling import BatchSampler
from errata.report.store import MeasurementStore


def measure_first_batch(
    request: ReportRequest,
    folder: Path,
    store: MeasurementStore,
    sampler: BatchSampler,
    *,
    announce: Callable[[str], None],
) -> ReportIndex:
    """Measure the first batch of every row that was asked for, and write the index; skip what is there.

    Raises:
        ReportError: the work does not fit into memory or on the disk; nothing was measured.
    """
    rows = request.rows()
    found = _earlier(request, folder, rows, store)
    if found is not None:
        return found
    if (estimate := warm_up(request, folder, rows, store, sampler)) is not None:
        announce(early_text(estimate))
    sampler.measure(rows, 0)
    index = _FirstBatch(request, rows, store).index()
    Target.of(request.reference).write(folder)
    index.write(folder)
    return index


@dataclass
class _FirstBatch:
    """The measurements of the first batch of all rows that were asked for."""

    request: ReportRequest
    rows: list[RowSpec]
    store: MeasurementStore
    # Alternatives that cannot be served, in order, each once.
    refusals: dict[str, None] = field(default_factory=dict)
    added_seconds: float = 0.0

    def index(self) -> ReportIndex:
        """Return the index, with everything that follows from the first batch."""
        request, store = self.request, self.store
        added = list(self.alternatives().values()) if request.compute_matched else []
        return ReportIndex(
            rows=tuple(_sorted([*self.rows, *added])),
            batches=tuple(map(len, store.batches)),
            batch_names=store.batch_names,
            protocol=self.protocol(),
            sizes={name: size_of(deployed) for name, deployed in request.artifacts.items()},
            backends={name: kernels_of(deployed) for name, deployed in request.artifacts.items()},
            repeats=tuple((*key, same) for key, same in repeats(self.rows).items()),
            growth=self.growth(),
            promised_seconds=self.seconds() / len(store.batches[0]) * request.samples,
            metrics=_described(request),
        )

    def growth(self) -> dict[str, Any]:
        """Return how errors grow along a run, by artifact."""
        return growth_of(
            self.request.artifacts,
            self.request.baseline,
            {name: self.request.plans_of(name) for name in self.request.artifacts},
            seed=self.request.seed,
            inputs=self.request.inputs,
            amplification_steps=self.request.amplification,
        )

    def alternatives(self) -> dict[str, RowSpec]:
        """Return compute-matched alternatives that were not asked for, by directory."""
        added: dict[str, RowSpec] = {}
        taken, names = {row.directory for row in self.rows}, {row.key for row in self.rows}
        for row, promised in self._candidates():
            if row.directory not in taken:
                taken.add(row.directory)
                is_taken = row.key in names  # by a plan of the user's
                name = f"{row.plan_name}, compute-matched" if is_taken else row.plan_name
                added[row.directory] = replace(row, plan_name=name)
                self.added_seconds += promised
        return added

    def seconds(self) -> float:
        """Return the seconds of denoiser calls of one batch of all rows."""
        once = {row.directory: row for row in self.rows}.values()
        return self.added_seconds + sum(self._seconds(row) for row in once)

    def protocol(self) -> Protocol:
        """Return the protocol, with notes on what could not be measured."""
        request, reference = self.request, self.request.reference
        models = {metric.name: metric.model for metric in request.image_metrics if metric.model}
        return make_protocol(
            next(iter(request.artifacts.values())),
            reference,
            samples=request.samples,
            seed=request.seed,
            batch_size=request.batch_size,
            image_size=self.store.image_size(self.rows[0].directory),
            paired_with=FLOAT if request.baseline is not None else UNCORRECTED,
            facts={**_resizing(reference), **models},
            notes=(
                *request.notes,
                *missing_notes(reference),
                *exception_notes(request.artifacts),
                *self.refusals,
            ),
        )

    def _candidates(self) -> Iterator[tuple[RowSpec, float]]:
        floats = [row for row in self.rows if row.role == "float"]
        for row in self.rows:
            if row.role != "plan":
                continue
            yield from self._of_artifact(row)
            if floats:
                calls = self.request.artifacts[row.artifact].schedule.calls_per_step
                cost = calls * self._cost(floats[0])["full"]
                steps = float_steps(self._seconds(row), cost, most=self.request.steps - 1)
                if steps is not None:
                    yield self.request.float_row(steps), steps * cost

    def _of_artifact(self, row: RowSpec) -> Iterator[tuple[RowSpec, float]]:
        deployed = self.request.artifacts[row.artifact]
        extra = self.store.facts_of(row.directory, 0).extra
        assert row.plan is not None  # it corrects something

        def refused(why: str) -> None:
            self.refusals[f"{row.artifact}: no compute-matched row for {why}"] = None

        found = alternatives_of(deployed, row.plan, extra, self._plain_cost(row), refused=refused)
        for alternative in found:
            yield _row(row.artifact, deployed, alternative), alternative.seconds

    def _cost(self, row: RowSpec) -> Costs:
        return self.store.facts_of(row.directory, 0).cost

    def _plain_cost(self, row: RowSpec) -> Costs:
        """Return the costs in the uncorrected run, which has calls of every kind; a corrected one may not."""
        plain = (each for each in self.rows if each.role in ("float", "uncorrected"))
        return self._cost(next(each for each in plain if each.artifact == row.artifact))

    def _seconds(self, row: RowSpec) -> float:
        """Return the seconds of denoiser calls of the first batch."""
        facts, costs = self.store.facts_of(row.directory, 0), self._plain_cost(row)
        return price(facts.base, costs) + price(facts.extra, costs)


def _earlier(
    request: ReportRequest, folder: Path, rows: list[RowSpec], store: MeasurementStore
) -> ReportIndex | None:
    """Return the index of an earlier process that was asked for the same."""
    if not (folder / FILE).is_file():
        return None
    index = ReportIndex.read(folder)
    wanted = [(row.key, row.directory) for row in rows]
    there = [(row.key, row.directory) for row in index.rows if row.role != "equal compute"]
    has_alternatives = len(there) < len(index.rows)
    is_same = (
        wanted == there
        and index.batch_names == store.batch_names
        and has_alternatives == request.compute_matched
        and amplified_at(index.growth) == request.amplification
        and index.metrics == _described(request)
    )
    return index if is_same else None


def _described(request: ReportRequest) -> tuple[Metric, ...]:
    return tuple(replace(metric, compute=None) for metric in request.metrics)


def _row(artifact: str, deployed: DeployedPipeline, alternative: ComputeMatched) -> RowSpec:
    return artifact_row(
        artifact,
        deployed,
        alternative.name,
        alternative.plan,
        role="equal compute",
        steps=alternative.steps,
        stands_for=alternative.stands_for,
    )


def _sorted(rows: list[RowSpec]) -> list[RowSpec]:
    """Return the rows artifact by artifact, in the order of their first rows; alternatives come last."""
    names = list(dict.fromkeys(row.artifact for row in rows))
    return sorted(rows, key=lambda row: (names.index(row.artifact), row.role == "equal compute"))


def _resizing(reference: Reference) -> dict[str, str]:
    """Return what the feature network does to images of another size, if it says so."""
    resizing = getattr(reference.network, "resizing", None)
    return {"Resizing": resizing} if isinstance(resizing, str) else {}
