"""Sheets for others: detached signatures, and the Hugging Face hub.

A signature is made and checked as that of an artifact is; see `errata.deploy.signing`.

On the hub a sheet lies beside the artifact that it belongs to, in its repository: one sheet,
`errata.sheet.safetensors`, and maybe its signature, `errata.sheet.sig`. Neither is a part of the artifact,
which can be pulled without them. Pushing an artifact removes the sheet of an earlier one, so a sheet is
pushed after it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from errata.canonical_json import file_digest
from errata.correct.methods.sheet import Sheet
from errata.correct.sheets.sheet_file import LARGEST_SHEET
from errata.deploy.hub import commit_of, hub_client, hub_errors
from errata.deploy.limits import LARGEST_MANIFEST, LARGEST_SETTINGS
from errata.deploy.manifest import MANIFEST_FILE, read_manifest
from errata.deploy.signature_check import check_signature
from errata.deploy.signing import sign_verified
from errata.directories import check_new_file, write_whole
from errata.errors import PlanError

SHEET_FILE = "errata.sheet.safetensors"
SIGNATURE_FILE = "errata.sheet.sig"
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
    return sign_verified(
        Path(sheet), Path(private_key), Path(signature), password=password, verified_by=Sheet.load
    )


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


def push_sheet(
    sheet: str | Path,
    repo_id: str,
    *,
    revision: str | None = None,
    signature: str | Path | None = None,
    public_key: str | Path | None = None,
    token: str | None = None,
) -> str:
    """Put a sheet beside its artifact in a model repository, in one commit; return the commit's URL.

    Args:
        sheet: a file that `Sheet.save` wrote.
        repo_id: as `"owner/name"`; it holds the artifact.
        revision: an existing branch; None is the main one.
        signature: what `sign_sheet` wrote, to be put beside it.
        public_key: with `signature`, which is checked first.
        token: None is the one of `hf auth login` or of the environment.

    Raises:
        PlanError: the sheet is damaged, or the repository holds another artifact.
        ArtifactError: the signature does not hold, or the hub refuses.
    """
    loaded = verify_sheet(sheet, signature=signature, public_key=public_key)
    source = commit_of(repo_id, revision=revision, token=token)
    with tempfile.TemporaryDirectory() as folder:
        source.download([MANIFEST_FILE], Path(folder), {MANIFEST_FILE: LARGEST_MANIFEST})
        there = read_manifest(Path(folder)).sha256
    if there != loaded.artifact:
        raise PlanError(
            f"{repo_id!r} holds the artifact {there[:12]}…, and the sheet was fitted to "
            f"{loaded.artifact[:12]}…; push that artifact first, or give its repository"
        )
    files = {SHEET_FILE: Path(sheet)} | ({} if signature is None else {SIGNATURE_FILE: Path(signature)})
    with hub_errors(f"push {sheet} to {repo_id!r}"):
        commit = hub_client(token).create_commit(
            repo_id,
            [CommitOperationAdd(name, path) for name, path in files.items()],
            commit_message=f"Sheet for the artifact {there[:12]}",
            repo_type="model",
            revision=revision,
        )
    return str(commit.commit_url)


def sheet_from_hub(
    repo_id: str,
    out: str | Path,
    *,
    revision: str | None = None,
    public_key: str | Path | None = None,
    token: str | None = None,
) -> Sheet:
    """Fetch the sheet of a repository, check it, write it to the new file `out`, and return it.

    Args:
        repo_id: as `"owner/name"`.
        out: a new file.
        revision: branch, tag or commit; None is the main branch.
        public_key: of the maker; the repository's `errata.sheet.sig` is checked with it.
        token: None is the one of `hf auth login` or of the environment.

    Raises:
        PlanError: `out` exists, its folder does not, or the sheet is damaged.
        ArtifactError: the repository has no sheet, or no signature where one is asked for; the signature does
            not hold; or the hub refuses.
    """
    path = Path(out)
    check_new_file(path, error=PlanError)
    source = commit_of(repo_id, revision=revision, token=token)
    wanted = {SHEET_FILE: LARGEST_SHEET} | ({} if public_key is None else {SIGNATURE_FILE: LARGEST_SETTINGS})
    with tempfile.TemporaryDirectory() as folder:
        source.download(list(wanted), Path(folder), wanted, otherwise="has no such sheet")
        signature = None if public_key is None else Path(folder) / SIGNATURE_FILE
        sheet = verify_sheet(Path(folder) / SHEET_FILE, signature=signature, public_key=public_key)
        write_whole(
            path, (Path(folder) / SHEET_FILE).read_bytes(), error=PlanError, advice="choose another file"
        )
    return sheet
