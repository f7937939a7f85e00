"""Artifacts on the Hugging Face hub: verified before they go there and after they come back.

A repository holds the artifact's files at its root, and beside them what is no part of it: the model card,
the hub's own `.gitattributes`, and a signature if there is one. Only files that the manifest lists are
fetched, each of the size that it says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete

import errata
from errata.deploy.hub_source import SIGNATURE_FILE, HubSource, hub_errors
from errata.deploy.manifest import MANIFEST_FILE
from errata.deploy.model_card import CARD_FILE, model_card
from errata.deploy.verification import verify
from errata.directories import check_is_vacant, staged_directory
from errata.errors import ArtifactError

_OF_THE_HUB = ".gitattributes"
_COMMIT = re.compile(r"[0-9a-f]{40,64}")


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
    """Verifies an artifact and makes it the whole content of a model repository, in one commit.

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
    api = _api(token)
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
    """Fetches an artifact, verifies it, and returns its directory.

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
    api = _api(token)
    with hub_errors(f"fetch {repo_id!r}" + ("" if revision is None else f" at {revision!r}")):
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        commit, sizes = str(info.sha), {item.rfilename: item.size for item in info.siblings or ()}
    if not _COMMIT.fullmatch(commit):  # it becomes a directory's name
        raise ArtifactError(
            f"the hub names the commit {commit[:80]!r} of {repo_id!r}, which is none; try again"
        )
    source = HubSource(api, repo_id, commit, sizes)
    if out is None:
        return _from_cache(source, public_key)
    with staged_directory(Path(out), error=ArtifactError) as staging:
        source.fetch(staging, public_key)
    return Path(out)


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


def _api(token: str | None) -> Any:
    return huggingface_hub.HfApi(token=token, library_name="errata", library_version=errata.__version__)
