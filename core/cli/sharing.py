"""`errata sign`, `errata push` and `errata pull`: give an artifact to others, and get one from them."""

import argparse
from pathlib import Path
from typing import Any

from errata.cli.output import emit
from errata.cli.usage import Commands, UsageError, add_artifact_argument, add_command, read_text

SIGN_DETAILS = """\
Verifies an artifact or a sheet, then signs it with your private key. The signature is a separate file beside
it. Others check it with your public key. To make a pair of keys with OpenSSL:

  openssl ecparam -name prime256v1 -genkey -noout -out key.pem
  openssl ec -in key.pem -pubout -out key.pub

Then sign, and check the signature:

  errata sign runs/cifar/artifact --key key.pem --out runs/cifar/artifact.sig
  errata verify runs/cifar/artifact --signature runs/cifar/artifact.sig --public-key key.pub
"""
PUSH_DETAILS = """\
Verifies an artifact and uploads it to a model repository on the Hugging Face hub, together with a generated
model card. Files that are in the repository and not in the artifact are removed. Log in first with
`hf auth login`.

  errata push runs/cifar/artifact me/cifar-w4a8 --private

A sheet goes beside its artifact, and is pushed after it:

  errata push runs/cifar/sheet.safetensors me/cifar-w4a8
"""
PULL_DETAILS = """\
Downloads the files that an artifact's manifest lists from a model repository on the Hugging Face hub, and
verifies them. With --public-key it checks the repository's signature as well.

  errata pull me/cifar-w4a8 --out runs/cifar/artifact
  errata pull me/cifar-w4a8 --sheet --out runs/cifar/sheet.safetensors
"""


def add_sign_parser(commands: Commands) -> None:
    """Declare `errata sign`."""
    parser = add_command(
        commands, "sign", summary="sign an artifact or a sheet with your key", details=SIGN_DETAILS
    )
    add_artifact_argument(parser, or_file=True)
    parser.add_argument(
        "--key", type=Path, required=True, metavar="KEY", help="private elliptic curve key, a PEM file"
    )
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="file whose first line is the password of an encrypted key",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new file for the signature")
    parser.set_defaults(run=sign)


def add_push_parser(commands: Commands) -> None:
    """Declare `errata push`."""
    parser = add_command(
        commands,
        "push",
        summary="upload an artifact or a sheet to the Hugging Face hub",
        details=PUSH_DETAILS,
    )
    add_artifact_argument(parser, or_file=True)
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="NAME", help="an existing branch (default: the main branch)")
    parser.add_argument("--signature", type=Path, metavar="FILE", help="signature that `errata sign` wrote")
    parser.add_argument(
        "--public-key", type=Path, metavar="FILE", help="public key to check the signature with, a PEM file"
    )
    parser.set_defaults(run=push)


def add_pull_parser(commands: Commands) -> None:
    """Declare `errata pull`."""
    parser = add_command(
        commands,
        "pull",
        summary="download an artifact or a sheet from the Hugging Face hub",
        details=PULL_DETAILS,
    )
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="new directory; for a sheet, new file"
    )
    parser.add_argument("--sheet", action="store_true", help="download the artifact's sheet in its place")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="the signer's public key, a PEM file")
    parser.set_defaults(run=pull)


def sign(args: argparse.Namespace) -> int:
    """Run `errata sign`."""
    from errata import deploy

    password = None if args.password_file is None else read_text(args.password_file).split("\n")[0]
    if args.artifact.is_file():
        from errata.correct.sheets.sheet_sharing import sign_sheet

        path = sign_sheet(args.artifact, args.key, args.out, password=password)
    else:
        path = deploy.sign(args.artifact, args.key, args.out, password=password)
    emit(args, {"signature": str(path)}, f"signature: {path}")
    return 0


def push(args: argparse.Namespace) -> int:
    """Run `errata push`."""
    check_signature_options(args)
    given: dict[str, Any] = {
        "revision": args.revision,
        "signature": args.signature,
        "public_key": args.public_key,
    }
    if args.artifact.is_file():
        if args.private:
            raise UsageError(
                "--private is for new repositories; a sheet goes to its artifact's: leave it out"
            )

        from errata.correct.sheets.sheet_sharing import push_sheet

        url = push_sheet(args.artifact, args.repository, **given)
    else:
        from errata import deploy

        url = deploy.push_to_hub(args.artifact, args.repository, private=args.private or None, **given)
    emit(args, {"repository": args.repository, "commit": url}, f"pushed: {url}")
    return 0


def _pull_sheet(args: argparse.Namespace) -> int:
    from errata.correct.sheets.sheet_sharing import sheet_from_hub

    sheet = sheet_from_hub(args.repository, args.out, revision=args.revision, public_key=args.public_key)
    emit(args, {"sheet": str(args.out), **sheet.summary()}, f"{sheet.summary_text()}\nverified: {args.out}")
    return 0


def pull(args: argparse.Namespace) -> int:
    """Run `errata pull`."""
    if args.sheet:
        return _pull_sheet(args)

    from errata import deploy

    path = deploy.from_hub(args.repository, args.out, revision=args.revision, public_key=args.public_key)
    manifest = deploy.verify(path)
    emit(
        args,
        {"artifact": str(path), "manifest_sha256": manifest.sha256},
        f"{manifest.summary()}\nverified: {path}",
    )
    return 0


def check_signature_options(args: argparse.Namespace) -> None:
    """Check that a signature comes with its public key.

    Raises:
        UsageError: only one of the two options was given.
    """
    if (args.signature is None) != (args.public_key is None):
        raise UsageError("--signature and --public-key belong together; give both, or neither")
