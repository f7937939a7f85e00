"""`sign`: a detached signature, which says who made an artifact; its own digests cannot.

The signature is a file of its own beside the artifact, never inside, where no file may be that the manifest
does not list. It is a Sigstore bundle over the SHA-256 of every file, made and checked by OpenSSF's
`model-signing`, so that its own command line checks it as well.

Source: OpenSSF Model Signing, https://github.com/sigstore/model-transparency.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from errata.deploy.signature_check import every_file, key_refusal, library
from errata.deploy.verification import verify
from errata.directories import whole_file
from errata.errors import ArtifactError


def sign(
    artifact: str | Path, private_key: str | Path, signature: str | Path, *, password: str | None = None
) -> Path:
    """Verify an artifact, sign it, write the new file `signature`, and return its path.

    Args:
        artifact: directory made by `export`.
        private_key: PEM file of an elliptic curve key: P-256, P-384 or P-521.
        signature: a new file outside the artifact.
        password: of an encrypted key.

    Raises:
        ArtifactError: as in `verify`; `model-signing` is not installed; the key cannot be used; or
            `signature` exists, is inside the artifact, or cannot be written.
    """
    return sign_verified(
        Path(artifact), Path(private_key), Path(signature), password=password, verified_by=verify
    )


def sign_verified(
    root: Path, key: Path, out: Path, *, password: str | None, verified_by: Callable[[Path], object]
) -> Path:
    """Sign a directory or a single file once `verified_by` has let it pass; see `sign`."""
    _check_outside(root, out)
    signing, hashing = library("signing"), library("hashing")
    verified_by(root)
    try:
        config = signing.Config().use_elliptic_key_signer(
            private_key=key, password=None if password is None else password.encode()
        )
    except Exception as error:  # the libraries below raise errors of any class
        raise key_refusal(key, error, "private") from error
    with whole_file(out, error=ArtifactError, advice="choose another place") as partial:
        config.set_hashing_config(every_file(hashing)).sign(root, partial)
    return out


def _check_outside(root: Path, out: Path) -> None:
    if out.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(
            f"{out} is inside the artifact, where no other file may be; write the signature beside it, as "
            f"{root.resolve().name}.sig"
        )
    if out.exists() or out.is_symlink():
        raise ArtifactError(f"{out} exists; choose another file or remove it")
    if not out.parent.is_dir():
        raise ArtifactError(f"cannot write {out}: {out.parent} is not a directory; create it first")
