"""Where the finished stages of a compression are kept, so that a killed run continues where it stopped.

They lie in `NAME.partial` beside the result NAME until that is complete, and are removed then; see
`errata.journal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.directories import check_is_vacant
from errata.errors import RecipeError
from errata.journal import Journal
from errata.journal_rules import JournalRules, finished_items, remove_published

__all__ = ["RULES", "count_finished", "open_journal", "remove_leftovers", "work_directory"]

RULES = JournalRules(
    work="an unfinished compression",
    format="errata-compression-work/1",
    error=RecipeError,
    request="request.json",
    lock="lock",
    items="stages",
    logger="errata.compress",
    has_own_folder=True,
)


def open_journal(out: Path, request: Mapping[str, Any]) -> Journal:
    """Return the journal, a context manager, of the compression that makes the directory `out`.

    `request` is everything that decides the bytes of the result.
    """

    def check_place() -> None:
        remove_leftovers(out)
        check_is_vacant(out, error=RecipeError)

    return Journal(work_directory(out), request, RULES, out=out, check_place=check_place)


def work_directory(out: Path) -> Path:
    """Return where the unfinished work for `out` lies: `NAME.partial` beside it."""
    target = out.resolve()
    return target.with_name(f"{target.name}.partial")


def remove_leftovers(out: Path) -> None:
    """Remove the work directory of a finished result, where a kill came before that was done."""
    remove_published(work_directory(out), RULES)


def count_finished(out: Path) -> int:
    """Return how many stages of the unfinished work for `out` are finished."""
    return len(finished_items(work_directory(out), RULES))
