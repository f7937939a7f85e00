"""`errata deploy`: freeze a compressed pipeline."""

import argparse
from pathlib import Path

from errata.cli.output import emit, megabytes
from errata.cli.usage import Commands, add_command, misuse
from errata.errors import ArtifactError

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
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="where the denoiser takes more, it is written to several files, as 500MB or 5GB (default: 5GB)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import compress, deploy
    from errata.deploy.sharding import size_in_bytes

    with misuse(ArtifactError):
        max_shard_size = size_in_bytes(args.max_shard_size)
    path = deploy.export(compress.load(args.compressed), args.out, max_shard_size=max_shard_size)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    emit(args, {"artifact": str(path), "bytes": size}, f"{megabytes(size)} artifact is in {path}")
    return 0
