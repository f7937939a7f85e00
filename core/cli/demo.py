"""`errata demo`: all stages on the built-in model."""

import argparse
from pathlib import Path

from errata.cli.output import emit
from errata.cli.usage import Commands, add_command

DETAILS = """\
Calibrates, compresses, freezes, corrects and measures a small model of handwritten digits. It runs on the CPU
in a few minutes, downloads nothing, and ends with a table and DIR/report.html.
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "demo",
        summary="run all stages on the small built-in model",
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
