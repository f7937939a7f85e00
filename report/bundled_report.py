"""Reports on disk: the one that ships with the package, and those that a run wrote."""

from __future__ import annotations

import json
from pathlib import Path

from errata.errors import ReportError
from errata.report.results import Report

DIGITS_T100: Path = Path(__file__).parent / "recorded" / "digits_t100.json"
"""The embedded model at 100 steps; `benchmarks/record_t100.py` writes it."""


def recorded_digits() -> Report | None:
    """Return the larger report on the embedded model; None if this build ships none.

    Raises:
        ReportError: the file is damaged.
    """
    if not DIGITS_T100.is_file():
        return None
    try:
        return Report.from_json(json.loads(DIGITS_T100.read_text(encoding="utf-8")))
    except ValueError as problem:
        raise ReportError(f"{DIGITS_T100} is not valid JSON: {problem}; reinstall errata") from problem


def read_report(out: str | Path) -> Report:
    """Return the report in the directory `out`.

    Raises:
        ReportError: there is none, or it is damaged.
    """
    file = Path(out) / "report.json"
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as problem:
        raise ReportError(f"`{file}` cannot be read as a report: {problem}") from problem
    return Report.from_json(value)
