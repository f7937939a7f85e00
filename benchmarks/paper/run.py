"""Reproduce rows of the tables of "Iterative Error Correction": the whole life of a model in one command.

    python benchmarks/paper/run.py benchmarks/paper/table1.yaml --work runs/paper
    python benchmarks/paper/run.py benchmarks/paper/table2/cifar10-deepcache-10-iec --samples 1000

Each CONFIG is a table, a row of a table, or a file or folder of your own rows. Every row is calibrated,
compressed, deployed and reported. Rows of one model share a calibration set; rows of one recipe share an
artifact and its images without correction. Finished work stays in `--work`, so the same command resumes a run
that was stopped. The result is in `WORK/tables`, as Markdown and JSON. README.md says where to get weights
and references.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import paper_table
from paper_configs import Config, load_configs
from paper_rows import Row, digest_of
from paper_stages import RESAMPLES, Bench, default_device
from paper_table import Line

from errata.errors import ErrataError, ReportError
from errata.quality import Reference, open_network

Asked = tuple[Row, Row]
"""A row as its table or file says, and as it is run."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command-line options."""
    parser = argparse.ArgumentParser(description="Reproduce rows of the paper's tables.")
    parser.add_argument(
        "configs",
        nargs="+",
        type=Path,
        metavar="CONFIG",
        help="table, row of a table (TABLE/ROW, or a pattern in quotes), or file or folder of your own rows",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/paper"),
        help="folder for all results; the same command resumes there (default: %(default)s)",
    )
    parser.add_argument(
        "--pipeline",
        metavar="DIR",
        help="diffusers folder or hub name, for all rows (default: that of each row)",
    )
    parser.add_argument(
        "--reference", metavar="SOURCE", help="real images: a folder, .npz statistics or DATASET:COLUMN"
    )
    parser.add_argument("--prompts", metavar="FILE", help="file of captions, one a line, for text models")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="images per row (default: the paper's 50,000 or 5,000)"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the paper's)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per batch, also in calibration")
    parser.add_argument("--calibration-samples", type=int, metavar="N", help="recorded trajectories")
    parser.add_argument(
        "--feature-network",
        metavar="NETWORK",
        help="as --features of `errata report`: inception (default, the paper's), inception:WEIGHTS, …",
    )
    parser.add_argument(
        "--clip",
        metavar="MODEL",
        help="hub name or folder of the CLIP model for the CLIP score; `none` for no score",
    )
    parser.add_argument(
        "--equal-compute",
        action="store_true",
        help="add compute-matched alternatives to each report; the table stays as it is",
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=RESAMPLES,
        metavar="N",
        help="bootstrap resamples per interval (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the rows and what they need, then stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished, write the table and print it."""
    options = parse_arguments(argv)
    try:
        configs = load_configs(options.configs)
        asked = [(row, changed(row, options)) for config in configs for row in config.rows]
        if options.dry_run:
            print("\n".join(told(row) for _, row in asked))
            return 0
        command = shlex.join(["python", "benchmarks/paper/run.py", *(argv or sys.argv[1:])])
        reproduce(asked, options, out=options.work / "tables" / title(configs), command=command)
    except ErrataError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def changed(row: Row, options: argparse.Namespace) -> Row:
    """Return the row with the settings of the command line."""
    calibration = dict(row.calibration)
    if options.calibration_samples is not None:
        calibration["samples"] = options.calibration_samples
    if options.batch_size is not None:
        calibration["batch_size"] = options.batch_size
    is_scored = row.clip is not None and options.clip != "none"
    return replace(row, clip=row.clip if is_scored else None).changed(
        pipeline=options.pipeline,
        reference=options.reference,
        prompts=options.prompts if row.prompts is not None else None,
        samples=options.samples,
        steps=options.steps,
        batch_size=options.batch_size,
        feature_network=options.feature_network,
        clip=options.clip if is_scored else None,
        calibration=calibration,
    )


def told(row: Row) -> str:
    """Return a row in one line."""
    needs = f"pipeline {row.pipeline}, reference {row.reference}" + (
        f", prompts {row.prompts}" if row.prompts else ""
    )
    needs += f", clip {row.clip}" if row.clip else ""
    left_out = f"; cannot be run: {row.unsupported['row']}" if "row" in row.unsupported else ""
    what = f"{row.dataset:14} {row.row:24} {row.recipe or 'float':40} {row.plan_name:24}"
    return f"table {row.table}  {what} {needs}{left_out}"


def reproduce(asked: Sequence[Asked], options: argparse.Namespace, *, out: Path, command: str) -> list[Line]:
    """Return every row, in the order asked for; the table is written to `out` after each recipe."""
    found: dict[int, Line] = {}
    page = ""
    for lines in measured(asked, options, command=command):
        found |= lines
        page = paper_table.write([found[index] for index in sorted(found)], out, command=command)
    print(page)
    print(f"{out}.md and {out}.json", file=sys.stderr)
    return [found[index] for index in sorted(found)]


def title(configs: Sequence[Config]) -> str:
    """Return the name of the table that is written for these configs."""
    joined = "+".join(dict.fromkeys(config.title for config in configs))
    return joined if len(joined) <= 80 else f"{joined[:70]}-{digest_of(joined)}"


def measured(
    asked: Sequence[Asked], options: argparse.Namespace, *, command: str
) -> Iterator[dict[int, Line]]:
    """Yield lines by index, model by model and recipe by recipe."""
    numbered = [
        (index, paper, row) for index, (paper, row) in enumerate(asked) if "row" not in row.unsupported
    ]
    left_out = {
        index: Line(row=row, paper=paper)
        for index, (paper, row) in enumerate(asked)
        if "row" in row.unsupported
    }
    if left_out:
        yield left_out
    for _, group in groupby(sorted(numbered, key=_model), key=_model):
        rows = list(group)
        bench = _bench(rows[0][2], options, command)
        for recipe, members in groupby(sorted(rows, key=_recipe), key=_recipe):
            yield _lines(bench, recipe, list(members))


def _model(item: tuple[int, Row, Row]) -> tuple[str, ...]:
    row = item[2]
    settings = (row.samples, row.batch_size, row.seed, row.reference, row.feature_network, row.clip)
    return (row.key, *map(str, settings))


def _recipe(item: tuple[int, Row, Row]) -> str:
    return item[2].recipe or ""


def _bench(row: Row, options: argparse.Namespace, command: str) -> Bench:
    return Bench(
        row,
        options.work,
        _reference(row),
        command,
        resamples=options.resamples,
        equal_compute=options.equal_compute,
    )


def _reference(row: Row) -> Reference:
    features = open_network(row.feature_network).to(default_device())
    try:
        return Reference.open(row.reference, features)
    except ReportError as problem:
        raise ReportError(
            f"{problem}. Give --reference, or make the statistics of real images: errata report --save-stats "
            f"{row.reference} --reference IMAGES --features {row.feature_network}"
        ) from problem


def _lines(bench: Bench, recipe: str, members: Sequence[tuple[int, Row, Row]]) -> dict[int, Line]:
    network = bench.reference.name
    if not recipe:
        found = bench.float_model()
        return {
            index: Line(row=row, paper=paper, frechet=found.frechet, metrics=found.metrics, network=network)
            for index, paper, row in members
        }
    report = bench.reported(recipe, [row for _, _, row in members])
    results = {result.plan: result for result in report.rows if not result.is_alternative}
    return {
        index: Line(
            row=row,
            paper=paper,
            frechet=results[row.plan_name].frechet,
            metrics=results[row.plan_name].metrics,
            network=network,
            overhead=results[row.plan_name].overhead,
            protocol=report.protocol.to_json(),
        )
        for index, paper, row in members
    }


if __name__ == "__main__":
    sys.exit(main())
