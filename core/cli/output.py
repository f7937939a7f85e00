"""What a command prints on stdout: JSON, tables, sizes and schedules."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.compress import CacheSchedule, Recipe
    from errata.estimates import Estimate

# Denoiser calls in one line of the schedule, and the distance between the numbers above them.
ROW, MARK = 100, 10


def emit(args: argparse.Namespace, payload: Mapping[str, Any], text: str) -> None:
    """Print one JSON object with `--json`, else the text."""
    print(json.dumps(payload, default=str, ensure_ascii=False) if args.json else text)


def announce(estimate: "Estimate") -> None:
    """Say on stderr what the work will take, before it begins."""
    for line in (*estimate.notes, estimate.text()):
        print(f"errata: {line}", file=sys.stderr)


def estimate_text(estimate: "Estimate") -> str:
    """Return what a dry run prints of an estimate."""
    from errata.estimates import size_text

    needs = [
        f"{need.what}: {size_text(need.needed)} needed, "
        + ("available is unknown" if need.available is None else f"{size_text(need.available)} available")
        for need in estimate.needs
    ]
    return "\n".join([*estimate.notes, estimate.text(), *needs, "nothing was written"])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in plain text; columns of numbers are aligned to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    numeric = [all(_is_number(cell) for cell in column) for column in zip(*body, strict=True)]
    lines = [_line(header, widths, numeric), "  ".join("-" * width for width in widths)]
    return "\n".join(lines + [_line(row, widths, numeric) for row in body])


def megabytes(size: float) -> str:
    """Return a number of bytes in kB or MB."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def exceptions_text(recipe: "Recipe") -> str:
    """Return which layers a recipe treats otherwise than the rest."""
    quantization = recipe.quantization
    return (quantization.exceptions() if quantization is not None else "") or "none"


def schedule_text(schedule: "CacheSchedule") -> str:
    """Return `cache_row`, and what a cached call recomputes."""
    resnets = "the last resnet" if schedule.branch == 1 else f"the last {schedule.branch} resnets"
    return f"{cache_row(schedule)} (F: full call; c: cached call, recomputes {resnets} of the up path)"


def cache_row(schedule: "CacheSchedule") -> str:
    """Return one character for each denoiser call: F for a full call, c for a cached one."""
    full = set(schedule.full_steps)
    return "".join("F" if step in full else "c" for step in range(schedule.num_steps))


def cache_text(schedule: "CacheSchedule", *, indent: str) -> str:
    """Return how many calls are full, and the schedule, one character for each call."""
    if not schedule.has_cache:
        return f"none: all {schedule.num_steps} calls are full"
    resnets = "the last resnet" if schedule.branch == 1 else f"the last {schedule.branch} resnets"
    summary = (
        f"{len(schedule.full_steps)} of {schedule.num_steps} calls are full (F); a cached call (c) "
        f"recomputes {resnets} of the up path"
    )
    if schedule.calls_per_step > 1:
        summary += f"; each sampling step makes {schedule.calls_per_step} calls"
    return "\n".join([summary, *(indent + line for line in _picture(cache_row(schedule)))])


def _picture(row: str) -> list[str]:
    """Return lines of `ROW` characters, each below the numbers of its calls."""
    lines = []
    for start in range(0, len(row), ROW):
        part = row[start : start + ROW]
        marks = "".join(f"{start + at:<{MARK}}" for at in range(0, len(part), MARK))
        lines += [marks.rstrip(), part]
    return lines


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    right = numeric or [False] * len(widths)
    padded = [
        cell.rjust(width) if to_the_right else cell.ljust(width)
        for cell, width, to_the_right in zip(cells, widths, right, strict=True)
    ]
    return "  ".join(padded).rstrip()


def _is_number(cell: str) -> bool:
    return cell.replace(".", "", 1).replace(",", "").isdigit()
