"""The options that describe a correction.

Methods and their options are those that `errata.method_options` finds in the methods themselves.
"""

import argparse
import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.usage import UsageError, finite, misuse, switch, whole
from errata.errors import PlanError
from errata.method_options import MethodEntry, MethodOption, method_entries

if TYPE_CHECKING:
    from errata.correct import Method, Plan

PLACES = (
    "where: all, full (not served from the cache), middle (of each interval between full ones), ends:1/10 "
    "(the first and last tenth), first:3, last:5, every:5, 0,3,7-9; joined with &"
)
AUTO = "auto"
READERS: dict[str, Callable[[str], Any]] = {
    "number": finite,
    "whole number": whole,
    "true or false": switch,
    "word": str,
}


@dataclass(frozen=True)
class Choice:
    """An option that sets a field of the methods that have it.

    Attributes:
        field: its name in the classes; the option has dashes.
        methods: each method that has it, by name, with how it declares the field.
    """

    field: str
    methods: dict[str, MethodOption]

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        return f"--{self.field.replace('_', '-')}"

    @property
    def allowed(self) -> tuple[str, ...] | None:
        """The words that it may be; None where it is not one of some words."""
        words = [option.allowed for option in self.methods.values()]
        return tuple(dict.fromkeys(word for each in words for word in each)) if all(words) else None

    @property
    def help(self) -> str:
        """What it does, for which methods, and their defaults."""
        told: dict[str, list[str]] = {}
        for name, option in self.methods.items():
            switchable = ", true or false" if option.kind == "true or false" else ""
            told.setdefault(option.help + switchable, []).append(f"{option.default} for {name}")
        return "; ".join(f"{text} (default: {', '.join(defaults)})" for text, defaults in told.items())

    def read(self, text: str) -> Any:
        """Return the value that `text` stands for; the text itself if methods read it differently.

        Raises:
            argparse.ArgumentTypeError: it is malformed.
        """
        kinds = {option.kind for option in self.methods.values()}
        return READERS[kinds.pop()](text) if len(kinds) == 1 else text


def choices() -> tuple[Choice, ...]:
    """Return the options of all methods, each field once."""
    found: dict[str, dict[str, MethodOption]] = {}
    for entry in method_entries():
        for option in entry.options:
            found.setdefault(option.field, {})[entry.name] = option
    return tuple(Choice(field, methods) for field, methods in found.items())


def method_names() -> tuple[str, ...]:
    """Return the methods that `--correct` takes."""
    return tuple(entry.name for entry in method_entries())


def methods_help() -> str:
    """Return what `--correct` takes, for help texts."""
    return (
        f"{', '.join(method_names())}; join several with +, in the order in which they act, and give each "
        "steps of its own after an @: forecast+hindsight, refresh@middle+forecast+hindsight"
    )


def plan_text(plan: "Plan") -> str:
    """Return the methods of a plan, each with its steps, for people."""
    from errata.correct import Sheet

    parts = [
        "the sheet" if isinstance(method, Sheet) else f"{method} at {steps}"
        for method, steps in plan.parts
        if method is not None
    ]
    return " + ".join(parts) or "no correction"


def add_sheet_option(group: argparse._ArgumentGroup) -> None:
    """Declare the option of a sheet."""
    group.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE",
        help="a sheet that `errata sheet` fitted to this artifact; goes with any other correction",
    )


def with_sheet(plan: "Plan", path: Path | None) -> "Plan":
    """Return the plan with the sheet in a file; itself without one.

    Raises:
        PlanError: the file is not a sheet.
    """
    if path is None:
        return plan

    from errata.correct import Plan, Sheet

    return Plan(Sheet.load(path)) + plan


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of one plan; those not given are None, so that the library's defaults hold."""
    group = parser.add_argument_group("correction")
    group.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="a plan file that `errata plan` wrote; replaces the options below",
    )
    group.add_argument(
        "--correct",
        type=methods_or_none,
        default=(),
        metavar="METHOD",
        help="none, auto (the best that costs nothing, chosen for this artifact in seconds), "
        f"{methods_help()} (default: none)",
    )
    group.add_argument("--at", metavar="STEPS", help=f"{PLACES} (default: all); for methods without an @")
    add_choices(group)


def add_choices(group: argparse._ArgumentGroup) -> None:
    """Declare the options of all methods. Their help has the defaults, by method."""
    for choice in choices():
        group.add_argument(
            choice.flag,
            type=choice.read,
            choices=choice.allowed,
            metavar=None if choice.allowed else "X",
            help=choice.help.replace("%", "%%"),
        )


def methods(text: str) -> tuple[str, ...]:
    """Return the methods that an option names, joined by `+`, each with `@` and steps or without."""
    given = tuple(part.strip() for part in text.split("+"))
    if any(name == AUTO for name, _ in map(placed, given)):
        raise argparse.ArgumentTypeError(
            f"'{text}': auto stands alone, because it chooses the methods itself; write auto, or name methods"
        )
    for name, _ in map(placed, given):
        if name not in method_names():
            raise argparse.ArgumentTypeError(
                f"unknown method '{name}'; choose from {', '.join(method_names())}; import your own "
                "method first, see docs/extend-corrector.md"
            )
    return given


def placed(given: str) -> tuple[str, str | None]:
    """Return a method's name, and the steps after its `@`, if there is one."""
    name, sign, steps = given.partition("@")
    return name, steps if sign else None


def methods_or_none(text: str) -> tuple[str, ...]:
    """Return the same as `methods_or_auto`; none of them for `none`."""
    return () if text == "none" else methods_or_auto(text)


def methods_or_auto(text: str) -> tuple[str, ...]:
    """Return the same as `methods`, and `auto` as it is."""
    return (AUTO,) if text == AUTO else methods(text)


def given_choices(args: argparse.Namespace) -> list[Choice]:
    """Return the options of methods that were given."""
    return [choice for choice in choices() if getattr(args, choice.field) is not None]


def methods_at(args: argparse.Namespace, given: tuple[str, ...], steps: str) -> "Plan":
    """Return the plan for these methods with their options, at their own steps or else at `steps`.

    Raises:
        UsageError: a method refuses the value of an option, or the steps are malformed.
    """
    from errata import correct

    entries = {entry.name: entry for entry in method_entries()}
    plans = []
    for name, own in map(placed, given):
        method = _method(args, entries[name])
        with misuse(PlanError):
            plans.append(correct.Plan(method, steps=steps if own is None else own))
    return functools.reduce(operator.add, plans)


def _method(args: argparse.Namespace, entry: MethodEntry) -> "Method":
    """Return a method with the options that were given for it.

    Raises:
        UsageError: it refuses one.
    """
    from errata.correct.registry import METHODS
    from errata.correct.validation import FieldError

    fields = {}
    for choice in given_choices(args):
        if entry.name in choice.methods:
            value, read = getattr(args, choice.field), READERS[choice.methods[entry.name].kind]
            with misuse(argparse.ArgumentTypeError):
                fields[choice.field] = read(value) if isinstance(value, str) else value
    try:
        return METHODS[entry.class_name](**fields)
    except FieldError as problem:
        flag, value = f"--{problem.field.replace('_', '-')}", fields.get(problem.field)
        raise UsageError(f"{flag} {value} with {entry.name}: it must be {problem.allowed}") from problem
    except PlanError as problem:
        raise UsageError(str(problem)) from problem


def plan_from(args: argparse.Namespace) -> "Plan":
    """Return the plan that the options describe.

    Raises:
        UsageError: the options do not fit together.
        PlanError: the file is not a plan.
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
    """Check that each option belongs to one of these methods.

    Raises:
        UsageError: one does not; the message names it.
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
        raise UsageError(f"{flags[0]} has no effect with --plan, which replaces it; leave one of them out")
