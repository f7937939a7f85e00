"""`errata report`: what each correction costs and buys."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from errata.cli.inputs import check_unconditional
from errata.cli.output import emit
from errata.cli.plans import CHOICES, METHODS_TOLD, PLACES, add_choices, given_choices, methods, methods_at
from errata.cli.usage import (
    Commands,
    UsageError,
    add_backend_option,
    add_batch_size_option,
    add_command,
    add_device_option,
    add_seed_option,
    check_seeds,
    several,
)

if TYPE_CHECKING:
    from errata.correct import Plan

DETAILS = """\
Makes the same images without correction, with it at each --at, and with each --plan, and compares them
with real ones by a Fréchet distance, in the features of the embedded network or of the one behind the
statistics. Writes report.html, report.md and report.json, which also say where correction made things
worse.

  errata report runs/digits/artifact --reference embedded --at ends:1/10 --at all --out runs/digits/report
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands, "report", summary="measure what each correction costs and buys", details=DETAILS
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what `errata deploy` wrote")
    parser.add_argument(
        "--reference",
        required=True,
        metavar="SOURCE",
        help="real images: a folder of PNG or JPEG files, an .npz of statistics (mu, sigma), or `embedded`, "
        "the digits of the built-in model",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the report")
    parser.add_argument(
        "--baseline", metavar="PIPELINE", help="the float pipeline, to compare image by image with it"
    )
    parser.add_argument("--samples", type=several, default=256, metavar="N", help="images (default: 256)")
    add_batch_size_option(parser, default=64)
    add_seed_option(parser)
    add_device_option(parser)
    add_backend_option(parser)
    group = parser.add_argument_group("correction")
    group.add_argument(
        "--plan",
        action="append",
        type=Path,
        metavar="FILE",
        help="what `errata plan` wrote; may be given several times, and with --at",
    )
    group.add_argument(
        "--correct",
        type=methods,
        default=("iec",),
        metavar="METHOD",
        help=f"at each --at: {METHODS_TOLD} (default: iec)",
    )
    group.add_argument(
        "--at",
        action="append",
        metavar="STEPS",
        help=f"{PLACES}; may be given several times; holds for all methods (default: all, of iec "
        "alone ends:1/10 as well, or nothing with --plan)",
    )
    add_choices(group)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import calibration, deploy, report

    check_seeds(args.seed, args.samples)
    plans = _plans(args)
    reference = report.Reference.open(args.reference)
    deployed = deploy.load(args.artifact, device=args.device, backend=args.backend)
    check_unconditional(deployed.pipe, what="a report")
    baseline = None if args.baseline is None else calibration.load_pipeline(args.baseline)
    result = report.run(
        deployed,
        plans,
        reference,
        args.out,
        samples=args.samples,
        batch_size=args.batch_size,
        seed=args.seed,
        baseline=None if baseline is None else baseline.to(deployed.pipe.device),
        command=shlex.join(_spelled(args)),
    )
    page = args.out / "report.html"
    emit(args, {"report": str(page), **result.to_json()}, f"{report.text_table(result)}\n\nreport: {page}")
    return 0


def _plans(args: argparse.Namespace) -> "dict[str, Plan]":
    """Those of the files, by their paths; and the method at each place, by the place.

    Raises:
        UsageError: the options do not fit together.
        PlanError: a file holds no plan.
    """
    idle = [choice.flag for choice in given_choices(args)]
    if args.plan and not args.at and idle:
        raise UsageError(f"{idle[0]} has no effect with --plan; give --at as well for a row of its own")

    from errata.correct import Plan

    plans = {str(path): Plan.load(path) for path in args.plan or ()}
    usual = ("ends:1/10", "all") if args.correct == ("iec",) else ("all",)
    places = args.at or (() if args.plan else usual)
    return plans | {steps: methods_at(args, steps) for steps in places}


def _spelled(args: argparse.Namespace) -> list[str]:
    """The command that gives the same report again."""
    words = ["errata", "report", str(args.artifact)]
    for name in (
        *("reference", "baseline", "samples", "batch_size", "seed", "device", "backend"),
        *("plan", "correct", "at", *(choice.field for choice in CHOICES), "out"),
    ):
        value = "+".join(args.correct) if name == "correct" else getattr(args, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                words += [f"--{name.replace('_', '-')}", str(each)]
    return words
