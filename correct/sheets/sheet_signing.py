"""Detached signatures of sheets, made and checked as those of artifacts are; see `errata.deploy.signing`."""

from __future__ import annotations

from pathlib import Path

from errata.canonical_json import file_digest
from errata.correct.methods.sheet import Sheet
from errata.deploy.signature_check import check_signature
from errata.deploy.signing import sign_contents

# How a signature of a single file calls that file.
_ITSELF = "."


def sign_sheet(
    sheet: str | Path, private_key: str | Path, signature: str | Path, *, password: str | None = None
) -> Path:
    """Verify a sheet, sign its file, write the new file `signature`, and return its path.

    Raises:
        PlanError: as `Sheet.load`.
        ArtifactError: as `errata.deploy.sign`.
    """
    Sheet.load(sheet)
    return sign_contents(Path(sheet), Path(private_key), Path(signature), password=password)


def verify_sheet(
    sheet: str | Path, *, signature: str | Path | None = None, public_key: str | Path | None = None
) -> Sheet:
    """Return the sheet in a file, which has to be whole, and signed by the owner of the key if one is given.

    Raises:
        PlanError: as `Sheet.load`.
        ArtifactError: as in `errata.deploy.verify`, of the signature.
    """
    loaded = Sheet.load(sheet)
    if signature is not None and public_key is not None:
        path = Path(sheet)
        check_signature(path, {_ITSELF: file_digest(path)}, Path(signature), Path(public_key))
    return loaded
