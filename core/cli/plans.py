"""The options that describe a correction."""

import argparse
import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.usage import UsageError, finite, misuse, positive, switch, whole
from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.correct import Plan

PLACES = (
    "where: all, full (not served from the cache), middle (of each interval between full ones), ends:1/10 "
    "(the first and last tenth), first:3, last:5, every:5, 0,3,7-9; joined with &"
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
METHODS_TOLD = (
    f"{', '.join(METHODS)}; several joined by +, the first one first, with @ each at steps of its own: "
    "forecast+hindsight, refresh@middle+forecast+hindsight"
)


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
    Choice("guard", ("iec",), "whether an image whose residual grows stops there: true or false", switch),
    Choice("stopping", ("iec",), "by which rule", allowed=("per_sample", "official")),
    Choice("cache_after", ("iec", "second-order"), "what cached steps read", allowed=("replace", "keep")),
    Choice("weight", ("second-order",), "of the evaluation at the end of the step", finite),
    Choice("order", ("forecast", "lookahead"), "of the polynomial through features", whole),
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
        type=methods_or_none,
        default=(),
        metavar="METHOD",
        help=f"none, {METHODS_TOLD} (default: none)",
    )
    group.add_argument("--at", metavar="STEPS", help=f"{PLACES} (default: all); not of methods with @")
    add_choices(group)


def add_choices(group: argparse._ArgumentGroup) -> None:
    """Declare the options of all methods."""
    for choice in CHOICES:
        group.add_argument(
            choice.flag,
            type=choice.kind,
            choices=choice.allowed,
            metavar=None if choice.allowed else "X",
            help=f"of {', '.join(choice.methods)}: {choice.words}",
        )


def methods(text: str) -> tuple[str, ...]:
    """An option's value that names methods, joined by `+`, each with `@` and steps or without."""
    given = tuple(part.strip() for part in text.split("+"))
    for name, _ in map(placed, given):
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"`{name}` is no method; known are {', '.join(METHODS)}")
    return given


def placed(given: str) -> tuple[str, str | None]:
    """A method's name, and the steps behind its `@`, if there is one."""
    name, sign, steps = given.partition("@")
    return name, steps if sign else None


def methods_or_none(text: str) -> tuple[str, ...]:
    """As `methods`; none of them for `none`."""
    return () if text == "none" else methods(text)


def given_choices(args: argparse.Namespace) -> list[Choice]:
    """Options of methods that were given."""
    return [choice for choice in CHOICES if getattr(args, choice.field) is not None]


def methods_at(args: argparse.Namespace, given: tuple[str, ...], steps: str) -> "Plan":
    """These methods with what the options say of them, each at steps of its own, or where it serves any of
    `steps`.

    Raises:
        UsageError: an option that none of these methods has, or a value that one refuses.
    """
    from errata import correct

    plans = []
    for name, own in map(placed, given):
        chosen = [choice.field for choice in given_choices(args) if name in choice.methods]
        with misuse(PlanError):
            method = getattr(correct, METHODS[name])(**{field: getattr(args, field) for field in chosen})
            plans.append(correct.Plan(method, steps=steps if own is None else own))
    return functools.reduce(operator.add, plans)


def plan_from(args: argparse.Namespace) -> "Plan":
    """The plan that the options describe.

    Raises:
        UsageError: the options do not fit together.
        PlanError: the file holds no plan.
    """
    if args.plan is None:
        check_options_belong(args, args.correct)
        if args.at is not None and not args.correct:
            raise UsageError("--at has no effect without `--correct METHOD`")
    else:
        _check_only_plan(args)

    from errata.correct import Plan

    if args.plan is not None:
        return Plan.load(args.plan)
    if not args.correct:
        return Plan.none()
    return methods_at(args, args.correct, "all" if args.at is None else args.at)


def check_options_belong(args: argparse.Namespace, given: Iterable[str]) -> None:
    """Refuse an option that none of these methods has.

    Raises:
        UsageError: naming it.
    """
    names = {name for name, _ in map(placed, given)}
    for choice in given_choices(args):
        if not names & set(choice.methods):
            needed = " or ".join(f"`--correct {method}`" for method in choice.methods)
            raise UsageError(f"{choice.flag} has no effect without {needed}")


def _check_only_plan(args: argparse.Namespace) -> None:
    flags = [choice.flag for choice in given_choices(args)]
    if args.at is not None:
        flags.insert(0, "--at")
    if args.correct:
        flags.insert(0, "--correct")
    if flags:
        raise UsageError(f"{flags[0]} has no effect with --plan, which says it all; leave one of them out")
