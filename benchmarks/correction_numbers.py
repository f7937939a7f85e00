"""Summarize the cells of the table of corrections: distances, costs, shares, verdicts, paired intervals.

A row and the row that it is compared with are resampled at the same images, which start from the same noise,
so intervals of differences and of shares are paired. If a row was measured from several seeds, its images are
pooled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from correction_cells import LEEWAY, MORE_STEPS, price
from tally import Tally
from torch import Tensor
from work_folder import load_arrays, save_arrays

from errata.quality import Estimate, FeatureStatistics, frechet_distance, mean_estimate, statistics
from errata.quality.intervals import centred_interval
from errata.report.report_index import Key

RESAMPLES = 500
FREE = 0.005  # an overhead below it counts as none


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What was measured on one artifact: of each row, the tallies by seed.

    Attributes:
        base_name: the same quantizer without a cache; None where there is no cache.
        base: its tallies, or the float model's; empty while they are missing.
        costs: seconds of a call, by kind, and of the float model's as "float".
        iec_overhead: of IEC at every full step.
        more_steps: the sampler steps of that row.
    """

    artifact: str
    base_name: str | None
    base: Sequence[Tally]
    measured: Mapping[str, Sequence[Tally]]
    costs: Mapping[str, float]
    steps: int
    iec_overhead: float
    more_steps: int


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """One row of the table.

    Attributes:
        fd: Fréchet distance to the reference.
        change: fd minus that of the uncorrected row.
        overhead: Σ(extra calls x cost) / Σ(base calls x cost).
        cost: of the float model's run.
        share: of the distance between the artifact and its base that is gone.
        by_seed: distances of the measurements, `changes` their differences; of one, empty.
    """

    plan: str
    fd: float
    change: Estimate | None
    psnr: float
    overhead: float
    cost: float
    share: Estimate | None
    by_seed: tuple[float, ...]
    changes: tuple[float, ...]
    evaluations: Mapping[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        estimates = {
            name: None if value is None else value.to_json()
            for name, value in (("change", self.change), ("share", self.share))
        }
        return {**vars(self), **estimates}


@dataclass(frozen=True)
class Summary:
    """An artifact's rows, and the distance that its cache adds, where it has one."""

    rows: Rows
    numbers: Sequence[Numbers]
    base_fd: float | None
    gap: Estimate | None


def summary_of(rows: Rows, target: FeatureStatistics, folder: Path) -> Summary:
    """Everything that follows from an artifact's cells; `folder` keeps resampled distances."""
    distances = {plan: resampled(tallies, target, folder) for plan, tallies in rows.measured.items()}
    none = distances["none"]
    base = resampled(rows.base, target, folder) if rows.base else None
    gap = None if base is None else estimate(none - base)
    numbers = []
    for plan, tallies in rows.measured.items():
        here = distances[plan]
        share = None
        if base is not None and gap is not None and gap.interval.low > 0 and plan != "none":
            share = estimate((none - here) / (none - base))
        by_seed = seeds_of(tallies, target)
        numbers.append(
            Numbers(
                plan=plan,
                fd=float(here[0]),
                change=None if plan == "none" else estimate(here - none),
                psnr=mean_psnr(tallies),
                overhead=seconds_of(tallies, rows) / seconds_of(rows.measured["none"], rows) - 1,
                cost=seconds_of(tallies, rows) / (rows.steps * rows.costs["float"]),
                share=share,
                by_seed=by_seed,
                changes=tuple(
                    a - b for a, b in zip(by_seed, seeds_of(rows.measured["none"], target), strict=True)
                ),
                evaluations=evaluations_of(tallies),
                seconds=sum(sum(tally.seconds) for tally in tallies),
            )
        )
    return Summary(rows, numbers, None if base is None else float(base[0]), gap)


def resampled(tallies: Sequence[Tally], target: FeatureStatistics, folder: Path) -> Tensor:
    """Distances (1 + RESAMPLES,): as measured, then of resampled images; kept under the features' digest."""
    features = torch.cat([tally.features for tally in tallies])
    digest = hashlib.sha256(features.numpy().tobytes()).hexdigest()[:24]
    file = folder / f"{digest}.npz"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)  # the same rows for every set of this size
        found = [frechet_distance(statistics(features), target)]
        for _ in range(RESAMPLES):
            rows = torch.randint(len(features), (len(features),), generator=generator)
            found.append(frechet_distance(statistics(features[rows]), target))
        save_arrays(file, {"distances": torch.tensor(found, dtype=torch.float64).numpy()})
    return torch.from_numpy(load_arrays(file)["distances"])


def estimate(values: Tensor) -> Estimate:
    """Of (1 + RESAMPLES,) values: as measured, then resampled."""
    return Estimate(float(values[0]), centred_interval(values[1:], float(values[0])))


def seeds_of(tallies: Sequence[Tally], target: FeatureStatistics) -> tuple[float, ...]:
    """Distance of each measurement alone; none of a single one."""
    if len(tallies) == 1:
        return ()
    return tuple(frechet_distance(statistics(tally.features), target) for tally in tallies)


def mean_psnr(tallies: Sequence[Tally]) -> float:
    """Mean over all images of the PSNR to the float model's."""
    values = [tally.psnr for tally in tallies]
    return mean_estimate(torch.cat([value for value in values if value is not None])).value


def evaluations_of(tallies: Sequence[Tally]) -> dict[str, float]:
    """Denoiser calls per image, by kind."""
    total = sum(tally.samples for tally in tallies)
    kinds = dict.fromkeys(kind for tally in tallies for kind in tally.evaluations)
    return {
        kind: sum(tally.evaluations.get(kind, 0.0) * tally.samples for tally in tallies) / total
        for kind in kinds
    }


def seconds_of(tallies: Sequence[Tally], rows: Rows) -> float:
    """Price of a run's calls."""
    return price(evaluations_of(tallies), rows.costs)


def front(summaries: Sequence[Summary]) -> list[Key]:
    """Rows that no other of their artifact beats: it is nearer and no dearer, or cheaper and no farther."""
    return [
        (summary.rows.artifact, row.plan)
        for summary in summaries
        for row in summary.numbers
        if not any(beats(other, row) for other in summary.numbers)
    ]


def beats(one: Numbers, other: Numbers) -> bool:
    """Whether a row is at least as good in both ways, and better in one."""
    return one.cost <= other.cost and one.fd <= other.fd and (one.cost, one.fd) != (other.cost, other.fd)


def to_json(summaries: Sequence[Summary], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The whole table as a plain JSON value."""
    on_front = set(front(summaries))
    return {
        "protocol": dict(protocol),
        "artifacts": [
            {
                "artifact": summary.rows.artifact,
                "base": summary.rows.base_name,
                "base_fd": summary.base_fd,
                "gap": None if summary.gap is None else summary.gap.to_json(),
                "seconds_of_a_call": dict(summary.rows.costs),
                "iec_overhead": summary.rows.iec_overhead,
                "more_steps": summary.rows.more_steps,
                "verdicts": verdicts(summary),
                "rows": [
                    row.to_json() | {"is_on_front": (summary.rows.artifact, row.plan) in on_front}
                    for row in summary.numbers
                ],
            }
            for summary in summaries
        ],
    }


def verdicts(summary: Summary) -> list[str]:
    """The best row that is free, and the best that costs no more than IEC at every full step."""
    limit = summary.rows.iec_overhead
    return [
        f"best free plan: {best(summary, FREE)}",
        f"best at no more than the cost of IEC (+{limit:.1%}): {best(summary, LEEWAY * (1 + limit) - 1)}",
    ]


def best(summary: Summary, limit: float) -> str:
    """The corrected row of the smallest distance within an overhead, and whether it is known to help."""
    rows = [row for row in summary.numbers if row.change is not None and row.overhead <= limit]
    if not rows:
        return "none measured"
    row = min(rows, key=lambda row: row.fd)
    assert row.change is not None  # by the choice above
    if row.change.interval.low > 0:
        return f"none; {row.plan} is the least bad, {signed(row.change)}"
    doubt = "" if row.change.interval.excludes_zero else ", not told from none"
    share = "" if row.share is None else f", {percent(row.share)} of the gap"
    return f"{row.plan}, FD {row.fd:.2f}, {signed(row.change)}{share}, overhead {row.overhead:+.1%}{doubt}"


def markdown(summaries: Sequence[Summary], protocol: Mapping[str, Any]) -> str:
    """The whole table, an artifact a section; rows on the front of distance against cost have a dot."""
    seeds = ", ".join(map(str, protocol["seeds"]))
    lines = [
        f"{protocol['samples']} images from each of these seeds: {seeds}; {protocol['steps']} steps; "
        f"{protocol['machine']}, {protocol['threads']} threads; {protocol['date']}; "
        + ", ".join(f"{name} {version}" for name, version in protocol["versions"].items()),
        "",
        f"    {protocol['command']}",
    ]
    on_front = set(front(summaries))
    for summary in summaries:
        lines += ["", f"## {summary.rows.artifact}", "", described(summary), ""]
        has_seeds = len(protocol["seeds"]) > 1
        columns = ["", "plan", "FD", "change", "PSNR", "overhead", "cost, float = 1"]
        columns += ["share of the gap"] if summary.base_fd is not None else []
        columns += ["FD by seed", "change by seed"] if has_seeds else []
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in summary.numbers:
            dot = "•" if (summary.rows.artifact, row.plan) in on_front else ""
            lines.append(f"| {' | '.join([dot, *cells(row, summary, has_seeds=has_seeds)])} |")
        lines += ["", *(f"- {verdict}" for verdict in verdicts(summary))]
    return "\n".join(lines) + "\n"


def described(summary: Summary) -> str:
    """What the artifact's calls cost and what its cache does, in a line."""
    costs = summary.rows.costs
    text = f"A full call takes {costs['full'] / costs['float']:.2f} of the float model's"
    if "cached" in costs:
        text += f", a cached one {costs['cached'] / costs['full']:.2f} of a full one"
    if summary.gap is not None:
        text += f"; base {summary.rows.base_name}, FD {summary.base_fd:.2f}, gap {signed(summary.gap)}"
    return text + "."


def cells(row: Numbers, summary: Summary, *, has_seeds: bool) -> list[str]:
    """A row's columns after the dot."""
    steps = f", T = {summary.rows.more_steps}" if row.plan == MORE_STEPS else ""
    found = [row.plan + steps, f"{row.fd:.2f}", "" if row.change is None else signed(row.change)]
    found += [f"{row.psnr:.1f}", f"{row.overhead:+.1%}", f"{row.cost:.3f}"]
    if summary.base_fd is not None:
        found.append("" if row.share is None else percent(row.share))
    if has_seeds:
        found.append(" ".join(f"{value:.2f}" for value in row.by_seed))
        found.append("" if row.change is None else " ".join(f"{value:+.2f}" for value in row.changes))
    return found


def signed(value: Estimate) -> str:
    """A difference with its interval."""
    return f"{value.value:+.2f} ({value.interval.low:+.2f} to {value.interval.high:+.2f})"


def percent(value: Estimate) -> str:
    """A share with its interval."""
    return f"{value.value:.0%} ({value.interval.low:.0%} to {value.interval.high:.0%})"
