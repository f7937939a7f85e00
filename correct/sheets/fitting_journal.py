"""Where the finished batches of a fit are kept, so that a killed one continues where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.correct.plans import Plan
from errata.correct.sampling import Inputs
from errata.errors import PlanError
from errata.fingerprint import value_digest
from errata.journal import Journal
from errata.journal_rules import JournalRules, remove_journal

if TYPE_CHECKING:
    from errata.correct.sheets.fitting import SheetChoices
    from errata.deploy import DeployedPipeline

RULES = JournalRules(
    work="an unfinished sheet",
    format="errata-sheet-work/1",
    error=PlanError,
    request="request.json",
    lock="lock",
    items="stages",
    logger="errata.correct",
    has_own_folder=True,
)


@contextmanager
def sheet_journal(path: Path, request: dict[str, Any]) -> Iterator[Journal]:
    """Yield the journal of a fit; it is removed when the block succeeds."""
    with Journal(path, request, RULES) as journal:
        yield journal
    remove_journal(path, RULES)


def request_of(
    deployed: DeployedPipeline, teacher: object, plan: Plan, choices: SheetChoices, inputs: Inputs
) -> dict[str, Any]:
    """Return everything that decides the bytes of a sheet."""
    batches = [batch for part in choices.batches.values() for batch in part]
    return {
        "artifact": deployed.manifest.sha256,
        "steps": deployed.num_inference_steps,
        "teacher": teacher if isinstance(teacher, str) else "float",
        "plan": plan.to_json(),
        "inputs": value_digest([dict(inputs(batch)) for batch in batches], name="inputs"),
        **asdict(choices),
    }
