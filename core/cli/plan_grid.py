"""Several plans at once: files, and methods at several places."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.plans import (
    METHODS_TOLD,
    PLACES,
    add_choices,
    check_options_belong,
    given_choices,
    methods,
    methods_at,
    placed,
)
from errata.cli.usage import UsageError

if TYPE_CHECKING:
    from errata.correct import Plan


def add_grid_options(group: argparse._ArgumentGroup) -> None:
    """Declare them."""
    group.add_argument(
        "--plan",
        action="append",
        type=Path,
        metavar="FILE",
        help="what `errata plan` wrote; may be given several times, and with the others",
    )
    group.add_argument(
        "--correct",
        action="append",
        type=methods,
        metavar="METHOD",
        help=f"at each --at: {METHODS_TOLD}; may be given several times (default: iec)",
    )
    group.add_argument(
        "--at",
        action="append",
        metavar="STEPS",
        help=f"{PLACES}; may be given several times; holds for methods without @ (default: all, of iec "
        "alone ends:1/10 as well, or nothing with --plan)",
    )
    add_choices(group)


def plans_of(args: argparse.Namespace) -> "dict[str, Plan]":
    """Those of the files, by their paths; and the methods, by their places, or by both if there are several.

    Raises:
        UsageError: the options do not fit together.
        PlanError: a file holds no plan.
    """
    asked = args.correct or [("iec",)]
    has_files_only = args.plan and not args.at and not args.correct
    idle = [choice.flag for choice in given_choices(args)]
    if has_files_only and idle:
        raise UsageError(f"{idle[0]} has no effect with --plan; give --at as well for a row of its own")
    if args.at and all(map(_is_placed, asked)):
        raise UsageError("--at has no effect: every method has steps of its own behind its @; leave it out")
    check_options_belong(args, [name for given in asked for name in given])

    from errata.correct import Plan

    plans = {str(path): Plan.load(path) for path in args.plan or ()}
    for given in () if has_files_only else asked:
        for steps in _places(args, given):
            plans[_name(args, asked, given, steps)] = methods_at(args, given, steps or "all")
    return plans


def _name(
    args: argparse.Namespace, asked: list[tuple[str, ...]], given: tuple[str, ...], steps: str | None
) -> str:
    """No longer than it takes to tell the plans apart."""
    text = "+".join(given)
    if steps is None or (len(asked) > 1 and not args.at and given != ("iec",)):
        return text
    return steps if len(asked) == 1 else f"{text} at {steps}"


def _places(args: argparse.Namespace, given: tuple[str, ...]) -> "tuple[str | None, ...]":
    """Where methods go that have no steps of their own; None where all have."""
    if _is_placed(given):
        return (None,)
    usual = ("ends:1/10", "all") if given == ("iec",) else ("all",)
    return tuple(args.at or usual)


def _is_placed(given: tuple[str, ...]) -> bool:
    """Whether all of these methods have steps of their own."""
    return all(steps is not None for _, steps in map(placed, given))
