"""The first batch of a report, and what it decides: costs, rows of equal compute, how long it will take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from errata.correct.costs import Costs, price
from errata.deploy import DeployedPipeline
from errata.quality.reference import Reference
from errata.report.asking import Asked
from errata.report.equal_compute import Rival, float_steps, rivals_of
from errata.report.grid import RowSpec, artifact_row, repeats
from errata.report.growth import amplified_at, growth_of
from errata.report.ledger import FILE, Ledger, Target
from errata.report.measurements import Measurements
from errata.report.protocol import Protocol
from errata.report.provenance import exception_notes, kernels_of, make_protocol, missing_notes, size_of
from errata.report.results import FLOAT, UNCORRECTED
from errata.report.sampling import BatchSampler, RowSamplers


def begin(
    asked: Asked,
    folder: Path,
    measurements: Measurements,
    samplers: RowSamplers,
    sampler: BatchSampler,
    *,
    facts: Mapping[str, str],
) -> Ledger:
    """Measures the first batch of every row that was asked for, and writes the ledger; does neither twice."""
    rows = asked.rows()
    found = _earlier(folder, rows, measurements, asked.equal_compute)
    if found is not None and amplified_at(found.growth) == asked.amplification:
        return found
    _warm_up(rows, samplers, measurements)
    sampler.measure(rows, 0)
    refusals: dict[str, None] = {}  # in order, each once
    added, seconds = _added(asked, rows, measurements, refusals) if asked.equal_compute else ([], 0.0)
    once = {row.directory: row for row in rows}.values()
    seconds += sum(_seconds(row, measurements, _plain_cost(row, rows, measurements)) for row in once)
    ledger = Ledger(
        rows=tuple(_sorted([*rows, *added])),
        batches=tuple(map(len, measurements.batches)),
        batch_names=measurements.names_of_batches,
        protocol=_protocol(asked, measurements, rows[0], facts, notes=tuple(refusals)),
        sizes={name: size_of(deployed) for name, deployed in asked.artifacts.items()},
        backends={name: kernels_of(deployed) for name, deployed in asked.artifacts.items()},
        repeats=tuple((*key, same) for key, same in repeats(rows).items()),
        growth=growth_of(
            asked.artifacts,
            asked.baseline,
            asked.plans,
            seed=asked.seed,
            inputs=asked.inputs,
            amplification_steps=asked.amplification,
        ),
        promised_seconds=seconds / len(measurements.batches[0]) * asked.samples,
    )
    Target.of(asked.reference).write(folder)
    ledger.write(folder)
    return ledger


def _earlier(
    folder: Path, rows: list[RowSpec], measurements: Measurements, equal_compute: bool
) -> Ledger | None:
    """The ledger of an earlier process that was asked for the same."""
    if not (folder / FILE).is_file():
        return None
    ledger = Ledger.read(folder)
    wanted = [(row.key, row.directory) for row in rows]
    there = [(row.key, row.directory) for row in ledger.rows if row.role != "equal compute"]
    has_rivals = len(there) < len(ledger.rows)
    is_same = wanted == there and ledger.batch_names == measurements.names_of_batches
    return ledger if is_same and has_rivals == equal_compute else None


def _warm_up(rows: list[RowSpec], samplers: RowSamplers, measurements: Measurements) -> None:
    """One image of every artifact, where its first batch is still to be timed."""
    for row in rows:
        if row.role in ("float", "uncorrected") and not measurements.has(row.directory, 0):
            samplers.of(row).sample(range(1))


def _added(
    asked: Asked, rows: list[RowSpec], measurements: Measurements, refusals: dict[str, None]
) -> tuple[list[RowSpec], float]:
    """Rows of equal compute that nobody asked for, and the seconds of a batch of all of them."""
    added: dict[str, RowSpec] = {}
    seconds = 0.0
    taken, names = {row.directory for row in rows}, {row.key for row in rows}
    for row, promised in _candidates(asked, rows, measurements, refusals):
        if row.directory not in taken:
            taken.add(row.directory)
            is_named = row.key in names  # somebody called another plan so
            name = f"{row.plan_name}, equal compute" if is_named else row.plan_name
            added[row.directory] = replace(row, plan_name=name)
            seconds += promised
    return list(added.values()), seconds


def _candidates(
    asked: Asked, rows: list[RowSpec], measurements: Measurements, refusals: dict[str, None]
) -> Iterator[tuple[RowSpec, float]]:
    float_cost = next((_cost(row, measurements)["full"] for row in rows if row.role == "float"), None)
    for row in rows:
        if row.role != "plan":
            continue
        deployed = asked.artifacts[row.artifact]
        costs = _plain_cost(row, rows, measurements)
        extra = measurements.facts_of(row.directory, 0).extra
        assert row.plan is not None  # it corrects something

        def refused(told: str, artifact: str = row.artifact) -> None:
            refusals[f"{artifact}: no row of equal compute for {told}"] = None

        for rival in rivals_of(deployed, row.plan, extra, costs, refused=refused):
            yield _rival_row(row.artifact, deployed, rival), rival.seconds
        if float_cost is not None:
            calls = deployed.schedule.calls_per_step
            steps = float_steps(_seconds(row, measurements, costs), calls * float_cost, most=asked.steps - 1)
            if steps is not None:
                yield asked.float_row(steps), steps * calls * float_cost


def _rival_row(artifact: str, deployed: DeployedPipeline, rival: Rival) -> RowSpec:
    return artifact_row(
        artifact,
        deployed,
        rival.name,
        rival.plan,
        role="equal compute",
        steps=rival.steps,
        stands_for=rival.stands_for,
    )


def _cost(row: RowSpec, measurements: Measurements) -> Costs:
    return measurements.facts_of(row.directory, 0).cost


def _plain_cost(row: RowSpec, rows: list[RowSpec], measurements: Measurements) -> Costs:
    """In the uncorrected run, which makes calls of every kind; a corrected one may lack some."""
    plain = ("float", "uncorrected")
    return _cost(
        next(each for each in rows if each.artifact == row.artifact and each.role in plain), measurements
    )


def _seconds(row: RowSpec, measurements: Measurements, costs: Costs) -> float:
    """Of the denoiser calls of a batch."""
    facts = measurements.facts_of(row.directory, 0)
    return price(facts.base, costs) + price(facts.extra, costs)


def _sorted(rows: list[RowSpec]) -> list[RowSpec]:
    """Artifact by artifact, in the order of their first rows; what was added comes last."""
    names = list(dict.fromkeys(row.artifact for row in rows))
    return sorted(rows, key=lambda row: (names.index(row.artifact), row.role == "equal compute"))


def _protocol(
    asked: Asked,
    measurements: Measurements,
    first: RowSpec,
    facts: Mapping[str, str],
    *,
    notes: tuple[str, ...],
) -> Protocol:
    return make_protocol(
        next(iter(asked.artifacts.values())),
        asked.reference,
        samples=asked.samples,
        seed=asked.seed,
        batch_size=asked.batch_size,
        image_size=measurements.image_size(first.directory),
        paired_with=FLOAT if asked.baseline is not None else UNCORRECTED,
        facts={**_resizing(asked.reference), **facts},
        notes=asked.notes + missing_notes(asked.reference) + exception_notes(asked.artifacts) + notes,
    )


def _resizing(reference: Reference) -> dict[str, str]:
    """What the feature network does to images of another size, where it says so."""
    resizing = getattr(reference.network, "resizing", None)
    return {"Resizing": resizing} if isinstance(resizing, str) else {}
