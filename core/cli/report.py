"""`errata report`: what each correction costs and buys."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from errata.cli.inputs import needs, words
from errata.cli.output import emit
from errata.cli.plans import PLACES, add_method_options, method_from
from errata.cli.usage import (
    Commands,
    UsageError,
    add_backend_option,
    add_batch_size_option,
    add_command,
    add_seed_option,
    check_seeds,
    misuse,
    several,
)
from errata.errors import PlanError

DETAILS = """\
Makes the same images without correction and with it at each --at, and compares them with real ones by a
Fréchet distance, in the features of the embedded network or of the one behind the statistics. Writes
report.html, report.md and report.json, which also say where correction made things worse.

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
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    add_backend_option(parser)
    group = parser.add_argument_group("correction")
    group.add_argument(
        "--at",
        action="append",
        metavar="STEPS",
        help=f"{PLACES}; may be given several times (default: ends:1/10 and all)",
    )
    add_method_options(group)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import calibration, correct, deploy, report

    check_seeds(args.seed, args.samples)
    method = method_from(args)
    with misuse(PlanError):
        plans = {steps: correct.Plan(method, steps=steps) for steps in args.at or ("ends:1/10", "all")}
    reference = report.Reference.open(args.reference)
    deployed = deploy.load(args.artifact, device=args.device, backend=args.backend)
    _check_unconditional(deployed.pipe)
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


def _check_unconditional(pipe: Any) -> None:
    """Refuse a model that draws nothing from noise alone, before any image.

    Raises:
        UsageError: naming what it needs.
    """
    if needed := needs(pipe):
        raise UsageError(
            f"this {type(pipe).__name__} needs {words(needed)} for every image, and a report has none to "
            "give so far; make the images with `errata generate`, plain and corrected, and compare them"
        )


def _spelled(args: argparse.Namespace) -> list[str]:
    """The command that gives the same report again."""
    words = ["errata", "report", str(args.artifact)]
    for name in (
        *("reference", "baseline", "samples", "batch_size", "seed", "device", "backend"),
        *("at", "step_size", "iterations", "out"),
    ):
        value = getattr(args, name)
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                words += [f"--{name.replace('_', '-')}", str(each)]
    return words
