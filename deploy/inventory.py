"""Checks of an artifact's files: exactly those in the manifest, plain, with their sizes and digests."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from errata.canonical_json import file_digest
from errata.deploy.manifest import MANIFEST_FILE, FileRecord, Manifest
from errata.errors import ArtifactCorruptError

# Names that mean the same file on every system.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


def check_files(root: Path, manifest: Manifest, *, manifest_file: str = MANIFEST_FILE) -> None:
    """Compare the directory with the manifest, a file of that name: names, kinds, sizes and digests.

    Raises:
        ArtifactCorruptError: naming the file.
        OSError: it cannot be read.
    """
    check_names(root, manifest, manifest_file=manifest_file)
    present = set()
    for path in _walk(root):
        name = path.relative_to(root).as_posix()
        if name not in manifest.files and name != manifest_file:
            raise ArtifactCorruptError(
                f"{path} is not listed in the manifest; remove it or copy the artifact again"
            )
        present.add(name)
    if missing := sorted(set(manifest.files) - present):
        raise ArtifactCorruptError(f"{root / missing[0]} is missing; copy the artifact again")
    # Sizes first: they are cheap, and the message says that a file was cut short.
    for name, record in manifest.files.items():
        _check_size(root / name, record)
    for name, record in manifest.files.items():
        _check_digest(root / name, record)


def check_names(root: Path, manifest: Manifest, *, manifest_file: str = MANIFEST_FILE) -> None:
    """Check that no name leads outside the artifact, and that each means one file on every system.

    Raises:
        ArtifactCorruptError: naming the file.
    """
    file = root / manifest_file
    folded: dict[str, str] = {manifest_file: manifest_file}
    for name in manifest.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name or "\\" in name:
            raise ArtifactCorruptError(f"{file} names a file outside the artifact: {name!r}")
        if not _PLAIN_NAME.fullmatch(name):
            raise ArtifactCorruptError(
                f"{file} names the file {name!r}; allowed are letters, digits, '.', '_' and '-' of ASCII, "
                "and no dot or '-' at the start; it was not written by errata"
            )
        if other := folded.get(name.lower()):
            raise ArtifactCorruptError(
                f"{file} names {other!r} and {name!r}, which some systems take for one file; it was not "
                "written by errata"
            )
        folded[name.lower()] = name


def _walk(root: Path) -> Iterator[Path]:
    """Yield every file below `root`, as the directory lists them; follow no link.

    Raises:
        ArtifactCorruptError: a link, a special file, or an empty directory.
    """
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        is_empty = True
        with os.scandir(folder) as entries:
            for entry in entries:
                is_empty = False
                path = folder / entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.is_file(follow_symlinks=False):
                    yield path
                else:
                    raise ArtifactCorruptError(
                        f"{path} is a link or special file; an artifact holds plain files only"
                    )
        if is_empty:
            raise ArtifactCorruptError(
                f"{folder} is an empty directory; remove it or copy the artifact again"
            )


def _check_size(path: Path, record: FileRecord) -> None:
    size = path.lstat().st_size
    if size != record.bytes:
        raise ArtifactCorruptError(
            f"{path} has {size:,} bytes, the manifest says {record.bytes:,}; copy it again"
        )


def _check_digest(path: Path, record: FileRecord) -> None:
    if file_digest(path) != record.sha256:
        raise ArtifactCorruptError(
            f"{path} was altered: its SHA-256 is not the manifest's; copy the artifact again"
        )
