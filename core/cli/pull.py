"""`errata pull`: fetch an artifact from the hub."""

import argparse
from pathlib import Path

from errata.cli.output import emit
from errata.cli.usage import Commands, add_command

DETAILS = """\
Fetches the files that an artifact's manifest lists from a model repository on the Hugging Face hub, and
verifies them. With --public-key the repository's signature is checked as well.

  errata pull me/cifar-w4a8 --out runs/cifar/artifact
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "pull", summary="fetch an artifact from the hub", details=DETAILS)
    parser.add_argument("repository", metavar="REPO", help="as owner/name")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="its maker's public key, a PEM file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import deploy

    path = deploy.from_hub(args.repository, args.out, revision=args.revision, public_key=args.public_key)
    manifest = deploy.verify(path)
    emit(
        args,
        {"artifact": str(path), "manifest_sha256": manifest.sha256},
        f"{manifest.summary()}\nverified: {path}",
    )
    return 0
