"""`errata verify`: check an artifact, byte for byte."""

import argparse
from pathlib import Path

from errata.cli.output import emit
from errata.cli.usage import Commands, add_command

DETAILS = """\
Checks the digest of every file, that every tensor is of its declared scheme, and that no float weight of
a quantized layer is inside. Runs nothing.
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "verify",
        summary="check an artifact against its manifest",
        details=DETAILS,
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what `errata deploy` wrote")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import deploy

    manifest = deploy.verify(args.artifact)
    emit(
        args,
        {"verified": True, "manifest": manifest.to_json()},
        f"{manifest.summary()}\nverified: {args.artifact}",
    )
    return 0
