"""Where an artifact comes from: one commit of a repository on the hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errata.deploy.inventory import check_names
from errata.deploy.limits import LARGEST_MANIFEST, LARGEST_SETTINGS
from errata.deploy.manifest import MANIFEST_FILE, Manifest, read_manifest
from errata.deploy.verification import verify
from errata.errors import ArtifactCorruptError, ArtifactError

# The signature's name in a repository: beside the artifact's files, and none of them.
SIGNATURE_FILE = "errata.sig"


class HubSource:
    """One commit of a repository.

    Attributes:
        api: the hub's client.
        sizes: bytes of every file that is there.
    """

    def __init__(self, api: Any, repo_id: str, commit: str, sizes: Mapping[str, int | None]) -> None:
        self.api, self.repo_id, self.commit, self.sizes = api, repo_id, commit, sizes

    def fetch(self, folder: Path, public_key: str | Path | None) -> None:
        """Puts the artifact, and nothing else, into an empty directory, and verifies it.

        Raises:
            ArtifactError: and its subclasses as in `verify`; or the repository holds no artifact.
        """
        self._download([MANIFEST_FILE], folder, {MANIFEST_FILE: LARGEST_MANIFEST})
        manifest = read_manifest(folder)
        check_names(folder, manifest)
        self._check_sizes(manifest)
        self._download(sorted(manifest.files), folder, {})
        with self.signature(public_key) as signature:
            verify(folder, signature=signature, public_key=public_key)

    @contextmanager
    def signature(self, public_key: str | Path | None) -> Iterator[Path | None]:
        """The repository's signature, for as long as the block runs; None where there is no key to check it.

        Raises:
            ArtifactError: the repository has none.
        """
        if public_key is None:
            yield None
            return
        with tempfile.TemporaryDirectory() as beside:
            self._download([SIGNATURE_FILE], Path(beside), {SIGNATURE_FILE: LARGEST_SETTINGS})
            yield Path(beside) / SIGNATURE_FILE

    def _check_sizes(self, manifest: Manifest) -> None:
        """Before gigabytes are fetched for nothing."""
        for name, record in manifest.files.items():
            if self.sizes.get(name) != record.bytes:
                raise ArtifactCorruptError(
                    f"{name} of {self.repo_id!r} has {self.sizes.get(name)} bytes, its manifest says "
                    f"{record.bytes:,}; push the artifact again"
                )

    def _download(self, names: list[str], folder: Path, largest: Mapping[str, int]) -> None:
        for name, most in largest.items():
            size = self.sizes.get(name)
            if size is None or size > most:
                found = "is not there" if size is None else f"has {size:,} bytes; allowed are {most:,}"
                raise ArtifactError(
                    f"{self.repo_id!r} at {self.commit[:12]} will not do: {name} {found}; give a repository "
                    "that `errata push` has filled"
                )
        with hub_errors(f"fetch {self.repo_id!r}"):
            # Into a directory of its own: the hub's cache consists of links, which no artifact holds.
            self.api.snapshot_download(
                self.repo_id,
                repo_type="model",
                revision=self.commit,
                local_dir=folder,
                allow_patterns=names,  # without wildcards: `check_names` has seen to it
            )
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's notes on what it fetched


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Whatever the hub's client raises, in one line."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # its own errors, those of the network, and those of the file system
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(
            f"cannot {doing}: {reason}; check the name, the revision, `hf auth login` and the network"
        ) from error
