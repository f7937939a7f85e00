"""Artifacts on the Hugging Face hub: verified before they go there and after they come back.

A repository holds the artifact's files at its root, and beside them what is not part of it: the model card,
the hub's own `.gitattributes`, and a signature if there is one. Only files that the manifest lists are
fetched, each of the size that it says.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

import errata
from errata.deploy.inventory import check_names
from errata.deploy.limits import LARGEST_MANIFEST, LARGEST_SETTINGS
from errata.deploy.manifest import MANIFEST_FILE, Manifest, read_manifest
from errata.deploy.model_card import model_card
from errata.deploy.verification import verify
from errata.directories import check_is_vacant, staged_directory
from errata.errors import ArtifactCorruptError, ArtifactError

_OF_THE_HUB = ".gitattributes"
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
# The signature's name in a repository: beside the artifact's files, and none of them.
SIGNATURE_FILE = "errata.sig"
CARD_FILE = "README.md"


def push_to_hub(
    artifact: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    card: str | None = None,
    signature: str | Path | None = None,
    public_key: str | Path | None = None,
    token: str | None = None,
) -> str:
    """Verify an artifact and make it the whole content of a model repository, in one commit.

    Args:
        artifact: directory made by `export`.
        repo_id: as `"owner/name"`; made if it does not exist.
        private: for a repository that is made; None is the hub's default.
        revision: an existing branch; None is the main one.
        commit_message: None is the artifact's recipe and digest.
        card: Markdown of the repository's page; None has one generated.
        signature: what `sign` wrote, to be put beside the artifact as `errata.sig`.
        public_key: with `signature`, which is checked first.
        token: None is the one of `hf auth login` or of the environment.

    Returns:
        URL of the commit.

    Raises:
        ArtifactError: and its subclasses as in `verify`; or the hub refuses.
    """
    root = Path(artifact)
    manifest = verify(root, signature=signature, public_key=public_key)
    text = model_card(manifest, repo_id) if card is None else card
    added: dict[str, Path | bytes] = {name: root / name for name in (MANIFEST_FILE, *sorted(manifest.files))}
    added[CARD_FILE] = text.encode()
    if signature is not None:
        added[SIGNATURE_FILE] = Path(signature)
    api = hub_client(token)
    with hub_errors(f"push {root} to {repo_id!r}"):
        api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        kept = {*added, _OF_THE_HUB}
        there = api.list_repo_files(repo_id, revision=revision, repo_type="model")
        # What an earlier artifact left, such as shards, would belong to none.
        stale = [CommitOperationDelete(name) for name in sorted(set(there) - kept)]
        commit = api.create_commit(
            repo_id,
            [*(CommitOperationAdd(name, data) for name, data in added.items()), *stale],
            commit_message=commit_message or f"{manifest.recipe.name}, artifact {manifest.sha256[:12]}",
            repo_type="model",
            revision=revision,
        )
    return str(commit.commit_url)


def from_hub(
    repo_id: str,
    out: str | Path | None = None,
    *,
    revision: str | None = None,
    public_key: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Fetch an artifact, verify it, and return its directory.

    Args:
        repo_id: as `"owner/name"`.
        out: a new directory; None is one in the hub's cache, by commit, where it is fetched once.
        revision: branch, tag or commit; None is the main branch.
        public_key: of the maker; the repository's `errata.sig` is checked with it.
        token: None is the one of `hf auth login` or of the environment.

    Raises:
        ArtifactError: and its subclasses as in `verify`; `out` exists; the hub refuses; or the repository
            holds no artifact, or no signature where one is asked for.
    """
    if out is not None:
        check_is_vacant(Path(out), error=ArtifactError)
    source = commit_of(repo_id, revision=revision, token=token)
    if out is None:
        return _from_cache(source, public_key)
    with staged_directory(Path(out), error=ArtifactError) as staging:
        source.fetch(staging, public_key)
    return Path(out)


def commit_of(repo_id: str, *, revision: str | None, token: str | None) -> HubSource:
    """Return the newest commit of a revision.

    Raises:
        ArtifactError: the hub refuses.
    """
    api = hub_client(token)
    with hub_errors(f"fetch {repo_id!r}" + ("" if revision is None else f" at {revision!r}")):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        commit, sizes = str(info.sha), {item.rfilename: item.size for item in info.siblings or ()}
    if not _COMMIT.fullmatch(commit):  # it becomes a directory's name
        raise ArtifactError(
            f"the hub names the commit {commit[:80]!r} of {repo_id!r}, which is not a commit hash; try again"
        )
    return HubSource(api, repo_id, commit, sizes)


def _from_cache(source: HubSource, public_key: str | Path | None) -> Path:
    place = (
        Path(huggingface_hub.constants.HF_HOME) / "errata" / source.repo_id.replace("/", "--") / source.commit
    )
    if place.is_dir() and any(place.iterdir()):
        with source.signature(public_key) as signature:
            verify(place, signature=signature, public_key=public_key)
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with staged_directory(place, error=ArtifactError) as staging:
        source.fetch(staging, public_key)
    return place


def hub_client(token: str | None) -> Any:
    """Return the hub's client; None is the token of `hf auth login` or of the environment."""
    return huggingface_hub.HfApi(token=token, library_name="errata", library_version=errata.__version__)


class HubSource:
    """One commit of a repository.

    Attributes:
        api: the hub's client.
        sizes: bytes of every file that is there.
    """

    def __init__(self, api: Any, repo_id: str, commit: str, sizes: Mapping[str, int | None]) -> None:
        self.api, self.repo_id, self.commit, self.sizes = api, repo_id, commit, sizes

    def fetch(self, folder: Path, public_key: str | Path | None) -> None:
        """Put the artifact, and nothing else, into an empty directory, and verify it.

        Raises:
            ArtifactError: and its subclasses as in `verify`; or the repository holds no artifact.
        """
        self.download([MANIFEST_FILE], folder, {MANIFEST_FILE: LARGEST_MANIFEST})
        manifest = read_manifest(folder)
        check_names(folder, manifest)
        self._check_sizes(manifest)
        self.download(sorted(manifest.files), folder, {})
        with self.signature(public_key) as signature:
            verify(folder, signature=signature, public_key=public_key)

    @contextmanager
    def signature(self, public_key: str | Path | None) -> Iterator[Path | None]:
        """Yield the repository's signature while the block runs; None without a key to check it.

        Raises:
            ArtifactError: the repository has none.
        """
        if public_key is None:
            yield None
            return
        with tempfile.TemporaryDirectory() as beside:
            self.download([SIGNATURE_FILE], Path(beside), {SIGNATURE_FILE: LARGEST_SETTINGS})
            yield Path(beside) / SIGNATURE_FILE

    def _check_sizes(self, manifest: Manifest) -> None:
        """Check the sizes before gigabytes are fetched for nothing."""
        for name, record in manifest.files.items():
            if self.sizes.get(name) != record.bytes:
                raise ArtifactCorruptError(
                    f"{name} of {self.repo_id!r} has {self.sizes.get(name)} bytes, its manifest says "
                    f"{record.bytes:,}; push the artifact again"
                )

    def download(
        self,
        names: list[str],
        folder: Path,
        largest: Mapping[str, int],
        *,
        otherwise: str = "is not an artifact",
    ) -> None:
        """Put files into a directory.

        Args:
            names: of the files.
            folder: the directory.
            largest: those that must be there, with the bytes that they may have.
            otherwise: what to say of the repository if one is not.

        Raises:
            ArtifactError: one is missing or too large, or the hub refuses.
        """
        for name, most in largest.items():
            size = self.sizes.get(name)
            if size is None or size > most:
                found = "is not there" if size is None else f"has {size:,} bytes; allowed are {most:,}"
                raise ArtifactError(
                    f"{self.repo_id!r} at {self.commit[:12]} {otherwise}: {name} {found}; give a "
                    "repository that `errata push` has filled"
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
    """Raise whatever the hub's client raises as an `ArtifactError` in one line."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:  # its own errors, those of the network, and those of the file system
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(
            f"cannot {doing}: {reason}; check the name, the revision, `hf auth login` and the network"
        ) from error
