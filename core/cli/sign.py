"""`errata sign`: vouch for an artifact."""

import argparse
from pathlib import Path

from errata.cli.output import emit
from errata.cli.usage import Commands, add_command, read_text

DETAILS = """\
Verifies an artifact and signs all its files with your private key. The signature is a file beside the
artifact, never inside. Others check it with your public key. A pair of keys, with OpenSSL:

  openssl ecparam -name prime256v1 -genkey -noout -out key.pem
  openssl ec -in key.pem -pubout -out key.pub

  errata sign runs/cifar/artifact --key key.pem --out runs/cifar/artifact.sig
  errata verify runs/cifar/artifact --signature runs/cifar/artifact.sig --public-key key.pub
"""


def add_parser(commands: Commands) -> None:
    """Declare the command."""
    parser = add_command(commands, "sign", summary="sign an artifact with your key", details=DETAILS)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="what `errata deploy` wrote")
    parser.add_argument(
        "--key", type=Path, required=True, metavar="KEY", help="private elliptic curve key, a PEM file"
    )
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="of an encrypted key: its password is the first line",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file for the signature")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from errata import deploy

    password = None if args.password_file is None else read_text(args.password_file).split("\n")[0]
    path = deploy.sign(args.artifact, args.key, args.out, password=password)
    emit(args, {"signature": str(path)}, f"signature: {path}")
    return 0
