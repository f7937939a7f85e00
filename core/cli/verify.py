"""`errata verify`: check an artifact, byte for byte."""

import argparse
from pathlib import Path

from errata.cli.output import emit
from errata.cli.usage import Commands, UsageError, add_command

DETAILS = """\
Checks the digest of every file, that every tensor is of its declared scheme, and that no float weight of
a quantized layer is inside. Runs nothing. Digests tell damage, a signature tells who made the artifact:

  errata verify runs/cifar/artifact --signature runs/cifar/artifact.sig --public-key key.pub
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
    parser.add_argument("--signature", type=Path, metavar="FILE", help="what `errata sign` wrote")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="its maker's public key, a PEM file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if (args.signature is None) != (args.public_key is None):
        raise UsageError("--signature and --public-key belong together; give both, or neither")

    from errata import deploy

    manifest = deploy.verify(args.artifact, signature=args.signature, public_key=args.public_key)
    signed = args.signature is not None
    emit(
        args,
        {"verified": True, "signed": signed, "manifest": manifest.to_json()},
        f"{manifest.summary()}\nverified: {args.artifact}"
        + (f"\nsigned by the owner of {args.public_key}" if signed else ""),
    )
    return 0
