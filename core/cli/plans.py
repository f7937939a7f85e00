"""The options that describe a correction."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.usage import UsageError, finite, misuse, positive, whole
from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.correct import Method, Plan

PLACES = (
    "where: all, full (not served from the cache), ends:1/10 (the first and last tenth), first:3, last:5, "
    "0,3,7-9; joined with &"
)

# Names on the command line, and the classes of errata.correct, which would be slow to import here.
METHODS = {
    "iec": "IEC",
    "second-order": "SecondOrder",
    "forecast": "Forecast",
    "lookahead": "Lookahead",
    "refresh": "Refresh",
    "hindsight": "Hindsight",
    "epsilon-scaling": "EpsilonScaling",
    "diffier": "DiffIER",
    "langevin": "Langevin",
}


@dataclass(frozen=True)
class Choice:
    """An option that is a field of the methods that have it; tests compare it with their classes.

    Attributes:
        field: its name in the class; the option has dashes.
        methods: that have it.
        kind: what reads the text; ranges are checked by the class.
        allowed: the words that it may be, if it is one of some words.
        words: what it does, for people.
    """

    field: str
    methods: tuple[str, ...]
    words: str
    kind: Callable[[str], Any] = str
    allowed: tuple[str, ...] | None = None

    @property
    def flag(self) -> str:
        """As it is written."""
        return f"--{self.field.replace('_', '-')}"


CHOICES = (
    Choice("step_size", ("iec", "diffier"), "how far an iteration goes", finite),
    Choice("iterations", ("iec", "langevin"), "at most, for each step", positive),
    Choice("tolerance", ("iec",), "an image whose iterate moves no further is done", finite),
    Choice("stopping", ("iec",), "by which rule", allowed=("per_sample", "official")),
    Choice("cache_after", ("iec", "second-order"), "what cached steps read", allowed=("replace", "keep")),
    Choice("weight", ("second-order",), "of the evaluation at the end of the step", finite),
    Choice("order", ("forecast", "lookahead", "hindsight"), "of the polynomial through features", whole),
    Choice("basis", ("forecast",), "of that polynomial", allowed=("newton", "hermite")),
    Choice("sigma", ("forecast",), "contraction of the hermite basis", finite),
    Choice("position", ("lookahead",), "where in the interval to look, 1 is its end", finite),
    Choice("gain", ("hindsight",), "how much of the error is taken back", finite),
    Choice("scale", ("epsilon-scaling",), "what the predicted noise is divided by", finite),
    Choice("slope", ("epsilon-scaling",), "what the scale grows by from step to step", finite),
    Choice("threshold", ("diffier",), "an image whose loss changes by less is done", finite),
    Choice("max_iterations", ("diffier",), "for each step", positive),
    Choice("snr", ("langevin",), "signal-to-noise ratio", finite),
)


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of one plan; those not given are None, so that the library's defaults hold."""
    group = parser.add_argument_group("correction")
    group.add_argument(
        "--plan", type=Path, metavar="FILE", help="what `errata plan` wrote; in place of all that follows"
    )
    group.add_argument(
        "--correct",
        choices=("none", *METHODS),
        default="none",
        metavar="METHOD",
        help=f"none, {', '.join(METHODS)} (default: none)",
    )
    group.add_argument("--at", metavar="STEPS", help=f"{PLACES} (default: all)")
    add_choices(group)


def add_choices(group: argparse._ArgumentGroup) -> None:
    """Declare the options of all methods."""
    for choice in CHOICES:
        group.add_argument(
            choice.flag,
            type=choice.kind,
            choices=choice.allowed,
            metavar=None if choice.allowed else "X",
            help=f"of {' and '.join(choice.methods)}: {choice.words}",
        )


def given_choices(args: argparse.Namespace) -> list[Choice]:
    """Options of methods that were given."""
    return [choice for choice in CHOICES if getattr(args, choice.field) is not None]


def method_from(args: argparse.Namespace) -> "Method":
    """The method that the options describe.

    Raises:
        UsageError: an option that this method does not have, or a value that it refuses.
    """
    _refuse_foreign_choices(args)

    from errata import correct

    method: type[Method] = getattr(correct, METHODS[args.correct])
    with misuse(PlanError):
        return method(**{choice.field: getattr(args, choice.field) for choice in given_choices(args)})


def plan_from(args: argparse.Namespace) -> "Plan":
    """The plan that the options describe.

    Raises:
        UsageError: the options do not fit together.
        PlanError: the file holds no plan.
    """
    if args.plan is None:
        _refuse_foreign_choices(args)
        if args.at is not None and args.correct == "none":
            raise UsageError("--at has no effect without `--correct METHOD`")
    else:
        _refuse_beside_a_plan(args)

    from errata.correct import Plan

    if args.plan is not None:
        return Plan.load(args.plan)
    if args.correct == "none":
        return Plan.none()
    with misuse(PlanError):
        return Plan(method_from(args), steps="all" if args.at is None else args.at)


def _refuse_foreign_choices(args: argparse.Namespace) -> None:
    for choice in given_choices(args):
        if args.correct not in choice.methods:
            needed = " or ".join(f"`--correct {method}`" for method in choice.methods)
            raise UsageError(f"{choice.flag} has no effect without {needed}")


def _refuse_beside_a_plan(args: argparse.Namespace) -> None:
    flags = [choice.flag for choice in given_choices(args)]
    if args.at is not None:
        flags.insert(0, "--at")
    if args.correct != "none":
        flags.insert(0, "--correct")
    if flags:
        raise UsageError(f"{flags[0]} has no effect with --plan, which says it all; leave one of them out")
