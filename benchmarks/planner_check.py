"""Check that the planner keeps its budget, and whether a row of the table of corrections beats its plan.

    python benchmarks/planner_check.py --work runs/correction --artifacts deepcache-20:branch=1

For every artifact and budget: `errata.correct.plan` searches with images that start from `--search-seed`.
Its plan, and the best rows of `correction_table.py`'s screening that cost no more, are then measured again on
new images from `--seed`. A row beats the plan if it is nearer to the reference by more than the paired 95 %
interval. Plans and measurements stay in `--work`, so the same command resumes a run that was stopped. Run the
screening with the same `--work` first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from correction_cells import MORE_STEPS, PLANS, Bench, Part
from correction_numbers import Numbers, estimate, resampled, signed
from correction_table import rows_of, summaries, work_list
from tally import Tally
from tqdm import tqdm
from work_folder import load_arrays, save_arrays, write_text

from errata.correct import Plan, plan
from errata.correct.sampling import PlanSampler, batches_of, default_inputs
from errata.machine import describe_machine, versions
from errata.quality.intervals import Estimate
from errata.report.results import Overhead

BUDGETS = (0.0, 0.05, 0.15, 0.5, 1.0)
BATCH_SIZE = 64
# A row whose cost is measured as that much more than the plan's counts as equally dear.
LEEWAY = 0.005


@dataclass(frozen=True)
class Verdict:
    """A plan at one budget, against the rows that cost no more."""

    artifact: str
    budget: float
    plan: Plan
    overhead: Overhead
    fd: float
    uncorrected: float
    rivals: dict[str, Estimate]  # the plan's distance minus the row's

    @property
    def beaten_by(self) -> list[str]:
        """Rows that are nearer to the reference, beyond the noise."""
        return [name for name, change in self.rivals.items() if change.interval.low > 0]


def parse_arguments() -> Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description="The planner against the table of corrections.")
    parser.add_argument("--work", type=Path, required=True, help="the folder that correction_table.py wrote")
    parser.add_argument(
        "--artifacts", nargs="+", required=True, metavar="RECIPE", help="artifacts to plan for"
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=list(BUDGETS),
        help="largest overheads allowed (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=100, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=1000, help="images per final measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--searched", type=int, default=256, help="images per finalist of the search (default: %(default)s)"
    )
    parser.add_argument(
        "--screened", type=int, default=256, help="images per row of the screening (default: %(default)s)"
    )
    parser.add_argument(
        "--rivals", type=int, default=3, help="most rows of the table to measure again (default: %(default)s)"
    )
    parser.add_argument(
        "--search-seed",
        type=int,
        default=2_000_000,
        help="seed of the first image of the search (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=3_000_000,
        help="seed of the first image of the final measurement (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then print the table."""
    options = parse_arguments()
    screening = Namespace(
        work=options.work, steps=options.steps, seed=0, samples=options.screened,
        artifacts=options.artifacts, plans=[*PLANS, MORE_STEPS],
    )  # fmt: skip
    bench = Bench(screening)
    verdicts: list[Verdict] = []
    for artifact in options.artifacts:
        rows = screened_rows(bench, artifact)
        for budget in options.budgets:
            verdicts.append(judge(bench, artifact, budget, rows, options))
            write_tables(bench, verdicts, options)
    print(write_tables(bench, verdicts, options))


def screened_rows(bench: Bench, artifact: str) -> Sequence[Numbers]:
    """Return the rows of the artifact's part of the screening."""
    parts = [Part(bench.options.samples, bench.options.seed)]
    keys = [key for key in work_list(bench) if key[0] == artifact]
    if not rows_of(bench, keys, parts):
        sys.exit(f"{artifact} was not screened; run correction_table.py with the same --work first")
    (summary,) = summaries(bench, keys, parts)
    return summary.numbers


def judge(bench: Bench, artifact: str, budget: float, rows: Sequence[Numbers], options: Namespace) -> Verdict:
    """Plan within a budget, and measure the plan and its rivals on other images."""
    found = planned(bench, artifact, budget, options)
    folder, target = bench.folder / "resampled", bench.reference.statistics
    tally = measured(bench, artifact, f"plan-{budget:g}", found, options)
    plain = measured(bench, artifact, "none", Plan.none(), options)
    own, none = resampled([tally], target, folder), resampled([plain], target, folder)
    overhead = tally.overhead(plain.seconds, bench.costs(artifact))  # at the prices of the table's rows
    affordable = [row for row in rows if row.overhead <= overhead.defined + LEEWAY]
    affordable = [row for row in affordable if row.plan not in ("none", MORE_STEPS)]
    changes = {}
    for row in sorted(affordable, key=lambda row: row.fd)[: options.rivals]:
        rival = measured(bench, artifact, row.plan, bench.plan((artifact, row.plan)), options)
        changes[row.plan] = estimate(own - resampled([rival], target, folder))
    return Verdict(artifact, budget, found, overhead, float(own[0]), float(none[0]), changes)


def planned(bench: Bench, artifact: str, budget: float, options: Namespace) -> Plan:
    """Return what the planner returns, kept in a file."""
    digest = bench.digest(artifact)
    file = options.work / "planned" / f"{digest[:16]}-{options.searched}-{budget:g}.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        deployed = bench.deployed(artifact)
        plan(
            deployed,
            budget,
            bench.reference,
            samples=options.searched,
            batch_size=BATCH_SIZE,
            seed=options.search_seed,
        ).save(file)
    return Plan.load(file)


def measured(bench: Bench, artifact: str, name: str, chosen: Plan, options: Namespace) -> Tally:
    """Return the tally of a plan on the images that nothing has seen, kept in a file."""
    made_of = json.dumps([bench.digest(artifact), chosen.to_json()])
    folder = options.work / "planned" / bench.digest(artifact)[:16]
    file = folder / f"{name}-seed{options.seed}-samples{options.samples}.npz"
    arrays = load_arrays(file) if file.is_file() else {}
    if not arrays or str(arrays["made_of"]) != made_of:
        sampler = PlanSampler(bench.deployed(artifact), chosen, seed=options.seed, inputs=default_inputs)
        tally = Tally(shown=0)
        for batch in tqdm(batches_of(options.samples, BATCH_SIZE), desc=f"{artifact} {name}", leave=False):
            tally.add(sampler.sample(batch), bench.reference, float_images=None)
        folder.mkdir(parents=True, exist_ok=True)
        save_arrays(file, tally.arrays() | {"made_of": np.asarray(made_of)})
        arrays = load_arrays(file)
    return Tally.from_arrays(arrays)


def write_tables(bench: Bench, verdicts: Sequence[Verdict], options: Namespace) -> str:
    """Write what is known so far as Markdown and JSON; return the Markdown."""
    lines = [
        f"{options.samples} images from seed {options.seed}, searched with {options.searched} from "
        f"{options.search_seed}; {options.steps} steps; {describe_machine()}; "
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items()),
        "",
        f"    {' '.join(['python', *sys.argv])}",
        "",
        "| artifact | budget | plan | overhead | by the clock | FD, uncorrected | FD | minus that of the "
        "best rows | beaten by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line_of(each) for each in verdicts]
    text = "\n".join(lines) + "\n"
    write_text(bench.folder / "planner.md", text)
    stored = json.dumps([as_json(each) for each in verdicts], indent=1)
    write_text(bench.folder / "planner.json", stored + "\n")
    return text


def line_of(verdict: Verdict) -> str:
    """Return its row of the table."""
    cells = [
        verdict.artifact,
        f"{verdict.budget:.0%}",
        told(verdict.plan),
        f"{verdict.overhead.defined:.1%}",
        f"{verdict.overhead.measured:.1%}",
        f"{verdict.uncorrected:.2f}",
        f"{verdict.fd:.2f}",
        "; ".join(f"{name} {signed(change)}" for name, change in verdict.rivals.items()),
        ", ".join(verdict.beaten_by) or "none",
    ]
    return f"| {' | '.join(cells)} |"


def told(chosen: Plan) -> str:
    """Return a plan in a few words."""
    named = [f"{type(method).__name__} at {steps}" for method, steps in chosen.parts if method is not None]
    return " + ".join(named) or "none"


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain JSON."""
    return {
        "artifact": verdict.artifact,
        "budget": verdict.budget,
        "plan": verdict.plan.to_json(),
        "overhead": verdict.overhead.defined,
        "overhead_by_the_clock": verdict.overhead.measured,
        "fd": verdict.fd,
        "uncorrected_fd": verdict.uncorrected,
        "minus_rivals": {name: change.to_json() for name, change in verdict.rivals.items()},
        "beaten_by": verdict.beaten_by,
    }


if __name__ == "__main__":
    main()
