"""Options of `errata report`: several plans at once, what is measured, and the command that they spell.

The plain ones are the fields of `errata.report_options.ReportOptions`: a new field is an option here.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.plans import (
    AUTO,
    PLACES,
    add_choices,
    check_options_belong,
    choices,
    given_choices,
    methods_at,
    methods_help,
    methods_or_auto,
    placed,
)
from errata.cli.usage import UsageError, positive, seed, several, whole
from errata.method_options import command_name
from errata.report_options import ReportOptions

if TYPE_CHECKING:
    from errata.correct import Plan

# Readers of whole numbers, by the least that is allowed.
_READERS: dict[int, Callable[[str], int]] = {0: whole, 1: positive, 2: several}
# Options that decide what a report measures, in the order in which its command shows them.
_FIRST = ("reference", "features", "baseline")
_LAST = (
    "device",
    "backend",
    "prompts",
    "labels",
    "negative_prompt",
    "guidance_scale",
    "input_images",
    "masks",
    "clip",
    "lpips",
    "metric",
)


def add_plain_options(group: argparse._ArgumentGroup) -> None:
    """Declare an option for each field of `ReportOptions`."""
    for item in fields(ReportOptions):
        about, default = item.metadata["about"], item.default
        flag = f"--{item.name.replace('_', '-')}"
        if isinstance(default, bool):
            flags = [flag.replace("--", "--no-", 1), item.metadata["old_flag"]]
            group.add_argument(*filter(None, flags), dest=item.name, action="store_false", help=about)
            continue
        group.add_argument(
            flag,
            type=_reader(item),
            default=default,
            metavar=item.metadata["metavar"],
            help=f"{about} (default: {'none' if default is None else default})",
        )


def add_metric_options(group: argparse._ArgumentGroup) -> None:
    """Declare what is measured."""
    group.add_argument(
        "--features",
        default="digit-features",
        metavar="NETWORK",
        help="feature network: inception (that of the FID), inception:WEIGHTS, a directory of a "
        "transformers vision model, package.module:attribute of your own, or digit-features, of the built-in "
        "model (default)",
    )
    group.add_argument("--clip", metavar="MODEL", help="a CLIP model, for the CLIP score of image and prompt")
    group.add_argument(
        "--lpips", choices=("alex", "vgg", "squeeze"), help="measure LPIPS, with this backbone"
    )
    group.add_argument(
        "--metric",
        action="append",
        metavar="METRIC",
        help="a metric of your own, package.module:attribute; may be repeated",
    )
    group.add_argument(
        "--save-stats", type=Path, metavar="FILE", help="write the statistics of --reference to FILE and stop"
    )


def add_scale_options(group: argparse._ArgumentGroup) -> None:
    """Declare shards and merging."""
    group.add_argument(
        "--shard", metavar="I/N", help="measure shard I of N, counted from 0, without making the report"
    )
    group.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="make the report of the measurements in these directories; takes no ARTIFACT",
    )


def plain_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the fields of `ReportOptions`."""
    return {item.name: getattr(args, item.name) for item in fields(ReportOptions)}


def command_of(args: argparse.Namespace) -> list[str]:
    """Return the command that makes the same report again."""
    words = ["errata", "report", *map(str, args.artifacts)]
    plain = [item for item in fields(ReportOptions) if not isinstance(item.default, bool)]
    changed = [item.name for item in plain if _is_spelled(item, getattr(args, item.name))]
    placed = ("plan", "sheet", "correct", "at", *(choice.field for choice in choices()))
    for name in (*_FIRST, *changed, *_LAST, *placed, "out"):
        words += _spelled(name, getattr(args, name))
    return [*words, *_switched_off(args)]


def _is_spelled(item: "Field[Any]", value: object) -> bool:
    """Return whether the command names a plain option: it decides the images, or was changed."""
    return item.name in ("samples", "batch_size", "seed", "resamples") or value != item.default


def _spelled(name: str, value: Any) -> Iterator[str]:
    if name == "correct":
        value = ["+".join(given) for given in value or ()]
    for each in value if isinstance(value, list) else [value]:
        if each is not None:
            yield f"--{name.replace('_', '-')}"
            yield str(each)


def _switched_off(args: argparse.Namespace) -> list[str]:
    switches = [item.name for item in fields(ReportOptions) if isinstance(item.default, bool)]
    return [f"--no-{name.replace('_', '-')}" for name in switches if not getattr(args, name)]


def _reader(item: "Field[Any]") -> Callable[[str], Any]:
    if item.name == "seed":
        return seed
    least = item.metadata["least"]
    return str if least is None else _READERS[least]


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
        "--sheet",
        action="append",
        type=Path,
        metavar="FILE",
        help="a sheet that `errata sheet` fitted, for a row with the plan of its fit; can be repeated",
    )
    group.add_argument(
        "--correct",
        action="append",
        type=methods_or_auto,
        metavar="METHOD",
        help="auto (for each artifact the best that costs nothing, chosen in seconds), "
        f"{methods_help()}; can be repeated, each at every --at (default: iec)",
    )
    group.add_argument(
        "--at",
        action="append",
        metavar="STEPS",
        help=f"{PLACES}; can be repeated; for methods without an @ (default: all, for iec also ends:1/10, "
        "and nothing with --plan or --sheet)",
    )
    add_choices(group)


def plans_of(args: argparse.Namespace) -> "dict[str, Plan]":
    """Return the plans of the files, by path, and those of the methods, by steps or by method and steps.

    That of `--correct auto` needs the artifact, and is not among them.

    Raises:
        UsageError: the options do not fit together.
        PlanError: a file is not a plan.
    """
    asked = [given for given in args.correct or [("iec",)] if given != (AUTO,)]
    has_files_only = (args.plan or args.sheet) and not args.at and not args.correct
    idle = [choice.flag for choice in given_choices(args)]
    if has_files_only and idle:
        files = "--plan" if args.plan else "--sheet"
        raise UsageError(f"{idle[0]} has no effect with {files}; add --at for a row with this option")
    if args.at and not asked:
        raise UsageError("--at has no effect with `--correct auto`, which chooses steps itself; leave it out")
    if args.at and all(map(_is_placed, asked)):
        raise UsageError("--at has no effect: every method has steps of its own after its @; leave it out")
    check_options_belong(args, [name for given in asked for name in given])

    from errata.correct import Plan

    plans = {str(path): Plan.load(path) for path in args.plan or ()}
    plans |= _sheets(args)
    for given in () if has_files_only else asked:
        for steps in _places(args, given):
            plans[_name(args, asked, given, steps)] = methods_at(args, given, steps or "all")
    return plans


def has_auto(args: argparse.Namespace) -> bool:
    """Return whether a row with the plan that is chosen for each artifact is asked for."""
    return (AUTO,) in (args.correct or ())


def _sheets(args: argparse.Namespace) -> "dict[str, Plan]":
    """Return the plans that the sheets were fitted under, with the sheets, by short names."""
    if not args.sheet:
        return {}

    from errata.correct import Plan, Sheet

    plans = [(path, Plan.of_sheet(Sheet.load(path))) for path in args.sheet]
    names = [_methods_of(plan) for _, plan in plans]
    if len(set(names)) < len(names):
        names = [f"{name} {path.stem}" for name, (path, _) in zip(names, plans, strict=True)]
    return {name: plan for name, (_, plan) in zip(names, plans, strict=True)}


def _methods_of(plan: "Plan") -> str:
    return "+".join(command_name(type(method).__name__) for method, _ in plan.parts if method)


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
