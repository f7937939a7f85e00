"""`errata push`: publish an artifact on the hub."""

import argparse
from pathlib import Path

from errata.cli.output import emit
from errata.cli.usage import Commands, UsageError, add_command

DETAILS = """\
Verifies an artifact and makes it the whole content of a model repository on the Hugging Face hub, with a
page that says what it is. Log in first, with `hf auth login`.

  errata push runs/cifar/artifact me/cifar-w4a8 --private
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "push", summary="publish an artifact on the hub", details=DETAILS)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what `errata deploy` wrote")
    parser.add_argument("repository", metavar="REPO", help="as owner/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="where it is made, for yourself only")
    parser.add_argument("--revision", metavar="NAME", help="an existing branch (default: the main one)")
    parser.add_argument("--signature", type=Path, metavar="FILE", help="what `errata sign` wrote")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="to check the signature with first")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if (args.signature is None) != (args.public_key is None):
        raise UsageError("--signature and --public-key belong together; give both, or neither")

    from errata import deploy

    url = deploy.push_to_hub(
        args.artifact,
        args.repository,
        private=True if args.private else None,
        revision=args.revision,
        signature=args.signature,
        public_key=args.public_key,
    )
    emit(args, {"repository": args.repository, "commit": url}, f"pushed: {url}")
    return 0
