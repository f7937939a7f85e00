"""The options that describe a correction."""

import argparse
from typing import TYPE_CHECKING

from errata.cli.usage import UsageError, fraction, misuse, positive
from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.correct import IEC, Plan

PLACES = (
    "where: all, full (not served from the cache), ends:1/10 (the first and last tenth), first:3, last:5, "
    "0,3,7-9; joined with &"
)
METHOD_OPTIONS = ("step_size", "iterations")


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of one plan; those not given are None, so that the library's defaults hold."""
    group = parser.add_argument_group("correction")
    group.add_argument(
        "--correct",
        choices=("none", "iec"),
        default="none",
        help="method; iec corrects iteratively (default: none)",
    )
    group.add_argument("--at", metavar="STEPS", help=f"{PLACES} (default: all)")
    add_method_options(group)


def add_method_options(group: argparse._ArgumentGroup) -> None:
    """Declare the options of the method alone."""
    group.add_argument(
        "--step-size", type=fraction, metavar="X", help="how far an iteration goes, in (0, 1] (default: 0.5)"
    )
    group.add_argument("--iterations", type=positive, metavar="N", help="at most, for each step (default: 1)")


def method_from(args: argparse.Namespace) -> "IEC":
    """The method that the options describe."""
    from errata.correct import IEC

    return IEC(**{name: getattr(args, name) for name in METHOD_OPTIONS if getattr(args, name) is not None})


def plan_from(args: argparse.Namespace) -> "Plan":
    """The plan that the options describe."""
    idle = [name for name in ("at", *METHOD_OPTIONS) if getattr(args, name) is not None]
    if idle and args.correct == "none":
        raise UsageError(f"--{idle[0].replace('_', '-')} has no effect without `--correct iec`")

    from errata.correct import Plan

    if args.correct == "none":
        return Plan.none()
    with misuse(PlanError):
        return Plan(method_from(args), steps="all" if args.at is None else args.at)
