"""Plans as small JSON files: `{"format": "errata-plan/1", "plan": …}`.

`plan` is what `Plan.to_json` gives: method, steps, the artifact it was chosen for, what it is worth.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from errata.canonical_json import loads_strict
from errata.directories import refusals_as, write_whole
from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.correct.plans import Plan

FORMAT = "errata-plan/1"
# A plan that names every one of a thousand steps takes a few kilobytes; more is no plan.
_LARGEST = 2**20


def save_plan(plan: Plan, path: str | Path) -> None:
    """Writes the file, complete or not at all, in place of what is there.

    Raises:
        PlanError: it cannot be written there.
    """
    target = Path(path)
    text = json.dumps({"format": FORMAT, "plan": plan.to_json()}, indent=2, allow_nan=False)
    write_whole(target, text.encode() + b"\n", error=PlanError, advice="choose another file")


def load_plan(path: str | Path) -> Plan:
    """Reads what `save_plan` wrote.

    Raises:
        PlanError: no such file, not a plan, of another format, or with a key or value that no plan has.
    """
    from errata.correct.plans import Plan

    source = Path(path)
    advice = "give a file that `errata plan` wrote"
    with refusals_as(PlanError, doing=f"read `{source}`", advice=advice), source.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise PlanError(f"`{source}` is larger than {_LARGEST:,} bytes, so it is no plan; plan again")
    try:
        value = loads_strict(data)
    except ValueError as problem:
        raise PlanError(f"`{source}` is no plan: {problem}; plan again") from problem
    stored = value.get("format") if isinstance(value, dict) else None
    if stored != FORMAT:
        raise PlanError(f"`{source}` has format {stored!r}; this release reads {FORMAT!r}; plan again")
    if set(value) != {"format", "plan"}:
        odd = sorted(set(value) ^ {"format", "plan"})
        # Quoted, since a key may be anything, control codes of a terminal included.
        raise PlanError(f"`{source}` has missing or unknown keys: {', '.join(map(repr, odd))}; plan again")
    try:
        return Plan.from_json(value["plan"])
    except PlanError as problem:
        raise PlanError(f"`{source}`: {problem}") from problem
    except RecursionError:
        raise PlanError(f"`{source}` is nested too deep to be a plan; plan again") from None
