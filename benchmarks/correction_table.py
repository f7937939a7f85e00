"""Measure what every correction gains on the embedded model, artifact by artifact, and what it costs.

    python benchmarks/correction_table.py --work runs/compression --samples 256
    python benchmarks/correction_table.py --work runs/compression --confirm 1000 --rows w8a8/scaling-1.002

The first command is the screening. `--confirm` measures some rows again, with that many images from each of
three seeds: those on the screening's front of distance against cost, the uncorrected rows, and those named by
`--rows`.

Artifacts are those of `compression_table.py`; give the same `--work` to share them. Finished cells stay in
`--work`, so the same command resumes a run that was stopped. A cell is measured again if its artifact or plan
has changed, but not if only the code has.

"more-steps" is not a correction: it is the same recipe calibrated at more sampler steps, as many as cost
about what IEC costs, among those at which sampling starts from about the same noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from compression_table import BATCH_SIZE
from correction_cells import (
    FIRST,
    LATER,
    MORE_STEPS,
    PLANS,
    Bench,
    Part,
    plain_price,
    served_plans,
)
from correction_numbers import Rows, Summary, front, markdown, summary_of, to_json
from tally import Tally
from tqdm import tqdm
from work_folder import write_text

from errata.compress import Recipe
from errata.machine import describe_machine, versions
from errata.report.report_index import FLOAT_KEY, Key

ARTIFACTS = (
    "w8a8",
    "w4a8",
    "w4a8-learned",
    *(f"deepcache-{n}{branch}" for n in (5, 10, 20) for branch in ("", ":branch=1")),
    *(f"w8a8+deepcache-{n}{branch}" for n in (10, 20) for branch in ("", ":branch=1")),
    "w8a8+cachequant-10",
    "w4a8+cachequant-10",
)
# Of the three measurements of `--confirm`, added to `--seed`; image i of a measurement has seed + i.
SEEDS = (0, 100_000, 200_000)


def parse_arguments() -> Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description="Corrections of the embedded model: distance and cost.")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for all results; the same command resumes there"
    )
    parser.add_argument("--steps", type=int, default=100, help="sampling steps (default: %(default)s)")
    parser.add_argument(
        "--samples", type=int, default=256, help="images per row of the screening (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image (default: %(default)s)")
    parser.add_argument(
        "--artifacts",
        nargs="+",
        default=list(ARTIFACTS),
        metavar="RECIPE",
        help="artifacts to measure (default: all of the table)",
    )
    parser.add_argument(
        "--plans",
        nargs="+",
        default=[*PLANS, MORE_STEPS],
        choices=[*PLANS, MORE_STEPS],
        help="plans to measure (default: all)",
    )
    parser.add_argument(
        "--confirm",
        type=int,
        nargs="?",
        const=1000,
        metavar="SAMPLES",
        help="measure the best rows again, with this many images from each of three seeds (1000)",
    )
    parser.add_argument(
        "--rows", nargs="*", default=[], metavar="RECIPE/PLAN", help="further rows to confirm"
    )
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then print the table."""
    options = parse_arguments()
    bench = Bench(options)
    keys, parts, name = work_list(bench), [Part(options.samples, options.seed)], "table"
    if options.confirm is not None:
        keys = to_confirm(bench, keys, parts)
        parts, name = [Part(options.confirm, options.seed + seed) for seed in SEEDS], "confirmed"
    progress = tqdm([(key, part) for key in keys for part in parts], desc="cells")
    for key, part in progress:
        progress.set_postfix_str(" ".join(key))
        if bench.stored(key, part) is None:
            bench.measure(key, part)
            write_tables(bench, keys, parts, name)
    print(write_tables(bench, keys, parts, name))


def work_list(bench: Bench) -> list[Key]:
    """Return every cell that is asked for, the most telling first."""
    options = bench.options
    wanted = [name for name in PLANS if name in options.plans or name == "none"]
    keys = [FLOAT_KEY, *((base, "none") for base in bases(options.artifacts))]
    for group in (FIRST, LATER):
        for artifact in options.artifacts:
            served = served_plans(wanted, bench.schedule(artifact))
            keys += [(artifact, plan) for plan in served if plan in group]
    if MORE_STEPS in options.plans:  # last, as artifacts have to be made
        keys += [(artifact, MORE_STEPS) for artifact in options.artifacts]
    return list(dict.fromkeys(keys))


def base_of(artifact: str) -> str | None:
    """Return the same quantizer without a cache, or the float model; None for what has no cache."""
    recipe = Recipe.named(artifact)
    if recipe.cache is None:
        return None
    return FLOAT_KEY[0] if recipe.quantization is None else Recipe(quantization=recipe.quantization).name


def bases(artifacts: Sequence[str]) -> list[str]:
    """Return the artifacts that the shares of others are measured against."""
    found = dict.fromkeys(base_of(artifact) for artifact in artifacts)
    return [base for base in found if base is not None and base != FLOAT_KEY[0]]


def to_confirm(bench: Bench, keys: Sequence[Key], screening: Sequence[Part]) -> list[Key]:
    """Return the cells on the screening's fronts, those that `--rows` names, and what both compare with."""
    named = [(row.partition("/")[0], row.partition("/")[2]) for row in bench.options.rows]
    for artifact, plan in named:
        if plan != MORE_STEPS and (
            plan not in PLANS or plan not in served_plans(list(PLANS), bench.schedule(artifact))
        ):
            sys.exit(f"--rows {artifact}/{plan}: {artifact} has no such row; known are {', '.join(PLANS)}")
    chosen = [*front(summaries(bench, keys, screening)), *named]
    if not chosen:
        sys.exit("nothing to confirm: run the screening first, or name some --rows")
    artifacts = list(dict.fromkeys(artifact for artifact, _ in chosen))
    plain = [(artifact, "none") for artifact in [*bases(artifacts), *artifacts]]
    return list(dict.fromkeys([FLOAT_KEY, *plain, *chosen]))


def rows_of(bench: Bench, keys: Sequence[Key], parts: Sequence[Part]) -> list[Rows]:
    """Return what was measured so far of each artifact, in the order of the keys."""
    found = []
    for artifact in dict.fromkeys(artifact for artifact, _ in keys if artifact != FLOAT_KEY[0]):
        plans = [plan for name, plan in keys if name == artifact]
        tallies = {plan: bench.tallies((artifact, plan), parts) for plan in plans}
        measured = {plan: stored for plan, stored in tallies.items() if stored}
        if "none" in measured:
            found.append(artifact_rows(bench, artifact, measured, parts))
    return found


def artifact_rows(
    bench: Bench, artifact: str, measured: Mapping[str, Sequence[Tally]], parts: Sequence[Part]
) -> Rows:
    """Return an artifact's rows with what they compare with."""
    base, costs, schedule = base_of(artifact), bench.costs(artifact), bench.schedule(artifact)
    return Rows(
        artifact=artifact,
        base_name=base,
        base=[] if base is None else bench.tallies((base, "none"), parts),
        measured=measured,
        costs=costs,
        steps=schedule.num_steps,
        iec_overhead=len(schedule.full_steps) * costs["full"] / plain_price(schedule, costs),
        more_steps=bench.more_steps(artifact),
    )


def summaries(bench: Bench, keys: Sequence[Key], parts: Sequence[Part]) -> list[Summary]:
    """Return what follows from it."""
    folder, target = bench.folder / "resampled", bench.reference.statistics
    return [summary_of(rows, target, folder) for rows in rows_of(bench, keys, parts)]


def write_tables(bench: Bench, keys: Sequence[Key], parts: Sequence[Part], name: str) -> str:
    """Write what is known so far as Markdown and JSON; return the Markdown."""
    found = summaries(bench, keys, parts)
    protocol = {
        "samples": parts[0].samples,
        "seeds": [part.seed for part in parts],
        "steps": bench.options.steps,
        "batch_size": BATCH_SIZE,
        "reference": bench.reference.source,
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(["python", *sys.argv]),
    }
    text, stored = markdown(found, protocol), to_json(found, protocol)
    write_text(bench.folder / f"{name}.md", text)
    write_text(bench.folder / f"{name}.json", json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    return text


if __name__ == "__main__":
    main()
