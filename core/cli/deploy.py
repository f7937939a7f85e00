"""`errata deploy`: freeze a compressed pipeline."""

import argparse
from pathlib import Path

from errata.cli.output import emit, megabytes
from errata.cli.usage import Commands, add_command

DETAILS = """\
Writes a diffusers-shaped directory with low-bit codes in place of float weights, and a manifest with the
digest of every file. Refuses a directory that is not empty.

  errata deploy runs/cifar/compressed --out runs/cifar/artifact
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "deploy",
        summary="freeze a compressed pipeline into an artifact",
        details=DETAILS,
    )
    parser.add_argument("compressed", type=Path, metavar="COMPRESSED", help="what `errata compress` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="ARTIFACT", help="new directory")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import compress, deploy

    path = deploy.export(compress.load(args.compressed), args.out)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    emit(args, {"artifact": str(path), "bytes": size}, f"{megabytes(size)} artifact is in {path}")
    return 0
