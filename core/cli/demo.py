"""`errata demo`: the whole life of a model, on the one inside the package."""

import argparse
from pathlib import Path

from errata.cli.output import emit
from errata.cli.usage import Commands, add_command

DETAILS = """\
Calibrates, compresses, freezes, corrects and judges a model of handwritten digits, on the CPU, in a few
minutes and without a download. Ends with a table and DIR/report.html.
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "demo",
        summary="show the whole life on a small built-in model",
        details=DETAILS,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="new directory (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import demo

    page = demo.run(args.out)
    emit(args, {"report": str(page)}, f"report: {page}")
    return 0
