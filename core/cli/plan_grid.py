"""Several plans at once: plan files, and methods at several places."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.plans import (
    PLACES,
    add_choices,
    check_options_belong,
    given_choices,
    methods,
    methods_at,
    methods_help,
    placed,
)
from errata.cli.usage import UsageError

if TYPE_CHECKING:
    from errata.correct import Plan


def add_grid_options(group: argparse._ArgumentGroup) -> None:
    """Declare the options of several plans."""
    group.add_argument(
        "--plan",
        action="append",
        type=Path,
        metavar="FILE",
        help="a plan file that `errata plan` wrote; can be repeated, and combined with the options below",
    )
    group.add_argument(
        "--correct",
        action="append",
        type=methods,
        metavar="METHOD",
        help=f"{methods_help()}; can be repeated, each at every --at (default: iec)",
    )
    group.add_argument(
        "--at",
        action="append",
        metavar="STEPS",
        help=f"{PLACES}; can be repeated; for methods without an @ (default: all, for iec also ends:1/10, "
        "and nothing with --plan)",
    )
    add_choices(group)


def plans_of(args: argparse.Namespace) -> "dict[str, Plan]":
    """Return the plans of the files, by path, and those of the methods, by steps or by method and steps.

    Raises:
        UsageError: the options do not fit together.
        PlanError: a file is not a plan.
    """
    asked = args.correct or [("iec",)]
    has_files_only = args.plan and not args.at and not args.correct
    idle = [choice.flag for choice in given_choices(args)]
    if has_files_only and idle:
        raise UsageError(f"{idle[0]} has no effect with --plan; add --at for a row with this option")
    if args.at and all(map(_is_placed, asked)):
        raise UsageError("--at has no effect: every method has steps of its own after its @; leave it out")
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
    """Return a name just long enough to tell the plans apart."""
    text = "+".join(given)
    if steps is None or (len(asked) > 1 and not args.at and given != ("iec",)):
        return text
    return steps if len(asked) == 1 else f"{text} at {steps}"


def _places(args: argparse.Namespace, given: tuple[str, ...]) -> "tuple[str | None, ...]":
    """Return the steps for methods that have none of their own; None where all have."""
    if _is_placed(given):
        return (None,)
    usual = ("ends:1/10", "all") if given == ("iec",) else ("all",)
    return tuple(args.at or usual)


def _is_placed(given: tuple[str, ...]) -> bool:
    """Return whether all of these methods have steps of their own."""
    return all(steps is not None for _, steps in map(placed, given))
