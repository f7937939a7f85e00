"""Artifacts that go to the hub and come back, with a stand-in for the hub that checks how it is called."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from sheets import made_up_sheet

from errata import cli, deploy
from errata.canonical_json import digest, dumps, file_digest
from errata.correct.sheets.sheet_sharing import push_sheet, sheet_from_hub
from errata.deploy.model_card import model_card
from errata.errors import ArtifactCorruptError, ArtifactError, PlanError

REPO = "someone/digits-w4a8"
PARTS = ["errata.json", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]


class Hub:
    """One repository of the hub; each call is bound to the signature of the real client's method."""

    def __init__(self) -> None:
        self.commits: list[dict[str, bytes]] = [{".gitattributes": b"*.safetensors filter=lfs"}]
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.names: set[str] = set()

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def client(self, *args: Any, **options: Any) -> "Hub":
        self._note("__init__", args, options)
        return self

    def _note(self, method: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        bound = inspect.signature(getattr(HfApi, method)).bind(self, *args, **options)
        self.calls.append((method, {key: value for key, value in bound.arguments.items() if key != "self"}))
        return SimpleNamespace(**{**dict.fromkeys(bound.signature.parameters), **bound.arguments})

    def create_repo(self, *args: Any, **options: Any) -> None:
        self.names.add(self._note("create_repo", args, options).repo_id)

    def list_repo_files(self, *args: Any, **options: Any) -> list[str]:
        self._note("list_repo_files", args, options)
        return list(self.files)

    def create_commit(self, *args: Any, **options: Any) -> Any:
        call = self._note("create_commit", args, options)
        files = dict(self.files)
        for operation in call.operations:
            if isinstance(operation, CommitOperationDelete):
                files.pop(operation.path_in_repo)
            elif isinstance(operation, CommitOperationAdd):
                data = operation.path_or_fileobj
                files[operation.path_in_repo] = (
                    data if isinstance(data, bytes) else Path(str(data)).read_bytes()
                )
        self.commits.append(files)
        return SimpleNamespace(commit_url=f"https://hub/{call.repo_id}/commit/{len(self.commits):040x}")

    def model_info(self, *args: Any, **options: Any) -> Any:
        call = self._note("model_info", args, options)
        if call.repo_id not in self.names:
            raise huggingface_hub.errors.HFValidationError(f"Repository Not\n Found: {call.repo_id}")
        number = len(self.commits) if call.revision in (None, "main") else int(call.revision, 16)
        siblings = [
            SimpleNamespace(rfilename=name, size=len(data) if call.files_metadata else None)
            for name, data in self.commits[number - 1].items()
        ]
        return SimpleNamespace(sha=f"{number:040x}", siblings=siblings)

    def snapshot_download(self, *args: Any, **options: Any) -> str:
        call = self._note("snapshot_download", args, options)
        assert len(call.revision) == 40, "a branch may move between two downloads"
        for name, data in self.commits[int(call.revision, 16) - 1].items():
            if name in call.allow_patterns:
                file = Path(call.local_dir) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
        notes = Path(call.local_dir) / ".cache" / "huggingface"
        notes.mkdir(parents=True, exist_ok=True)
        (notes / "CACHEDIR.TAG").write_text("x")
        return str(call.local_dir)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in.client)
    return stand_in


@pytest.fixture
def artifact(tiny_artifact: Callable[[str], Path]) -> Path:
    return tiny_artifact("w4a8+cachequant-2")


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_it_comes_back_byte_for_byte(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    url = deploy.push_to_hub(artifact, REPO)
    assert url == f"https://hub/{REPO}/commit/{2:040x}"
    assert sorted(hub.files) == sorted([".gitattributes", "README.md", *PARTS, "unet/errata.safetensors"])
    path = deploy.from_hub(REPO, tmp_path / "back")
    assert path == tmp_path / "back"
    assert contents(path) == contents(artifact)
    assert deploy.load(path).manifest.sha256 == deploy.verify(artifact).sha256


def test_what_the_hub_is_asked(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    deploy.push_to_hub(artifact, REPO, private=True, revision="main", commit_message="first", token="secret")
    asked = dict(hub.calls)
    assert asked["__init__"]["token"] == "secret"
    assert asked["__init__"]["library_name"] == "errata"
    assert asked["create_repo"] == {"repo_id": REPO, "private": True, "repo_type": "model", "exist_ok": True}
    assert asked["create_commit"]["commit_message"] == "first"
    assert asked["create_commit"]["revision"] == "main"
    deploy.from_hub(REPO, tmp_path / "back", revision="main")
    downloads = [call for name, call in hub.calls if name == "snapshot_download"]
    assert [call["allow_patterns"] for call in downloads] == [
        ["errata.json"],
        [*PARTS[1:], "unet/errata.safetensors"],
    ]


def test_a_revision_is_that_artifact(
    hub: Hub, artifact: Path, tiny_artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    deploy.push_to_hub(artifact, REPO)
    deploy.push_to_hub(tiny_artifact("w8a8"), REPO)
    assert contents(deploy.from_hub(REPO, tmp_path / "new")) == contents(tiny_artifact("w8a8"))
    assert contents(deploy.from_hub(REPO, tmp_path / "old", revision=f"{2:040x}")) == contents(artifact)


def test_what_an_earlier_artifact_left_is_removed(hub: Hub, artifact: Path) -> None:
    hub.commits.append({**hub.files, "unet/errata-00001-of-00002.safetensors": b"x", "notes.md": b"x"})
    deploy.push_to_hub(artifact, REPO)
    assert set(hub.files) == {".gitattributes", "README.md", *PARTS, "unet/errata.safetensors"}


def test_without_a_directory_it_is_fetched_once(
    hub: Hub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    deploy.push_to_hub(artifact, REPO)
    first = deploy.from_hub(REPO)
    assert first == tmp_path / "cache" / "errata" / "someone--digits-w4a8" / f"{2:040x}"
    count = len(hub.calls)
    assert deploy.from_hub(REPO) == first
    assert [name for name, _ in hub.calls[count:]] == ["__init__", "model_info"]
    (first / "unet" / "config.json").write_bytes(b"{}")
    with pytest.raises(ArtifactCorruptError, match="config.json has 2 bytes"):
        deploy.from_hub(REPO)


def test_nothing_is_pushed_that_does_not_verify(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(artifact, tmp_path / "broken"))
    (broken / "unet" / "config.json").write_bytes(b"{}")
    with pytest.raises(ArtifactCorruptError, match="config.json has 2 bytes"):
        deploy.push_to_hub(broken, REPO)
    assert hub.calls == []


def repo_with(hub: Hub, artifact: Path, **changes: bytes | None) -> None:
    """The artifact's repository, changed on the hub by somebody else."""
    deploy.push_to_hub(artifact, REPO)
    files = {**hub.files, **{name: data for name, data in changes.items() if data is not None}}
    hub.commits.append({name: data for name, data in files.items() if changes.get(name, b"") is not None})


def test_a_listed_file_of_another_size_is_not_fetched(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    repo_with(hub, artifact, **{"unet/errata.safetensors": b"x" * 10**6})
    with pytest.raises(ArtifactCorruptError, match="errata.safetensors of .* has 1000000 bytes, its "):
        deploy.from_hub(REPO, tmp_path / "back")
    assert len([name for name, _ in hub.calls if name == "snapshot_download"]) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"errata.json": None}, "is not an artifact: errata.json is not there"),
        (
            {"errata.json": b" " * 9 * 2**20},
            "is not an artifact: errata.json has 9,437,184 bytes; allowed are 8",
        ),
        ({"errata.json": b"{}"}, "has format 'None'"),
        ({"unet/config.json": None}, "unet/config.json of .* has None bytes, its manifest says"),
    ],
)
def test_repositories_without_a_whole_artifact(
    changes: dict[str, bytes | None], message: str, hub: Hub, artifact: Path, tmp_path: Path
) -> None:
    repo_with(hub, artifact, **changes)
    with pytest.raises(ArtifactError, match=message):
        deploy.from_hub(REPO, tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_bytes_altered_on_the_hub(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    data = bytearray((artifact / "unet" / "errata.safetensors").read_bytes())
    data[-1] ^= 1
    repo_with(hub, artifact, **{"unet/errata.safetensors": bytes(data)})
    with pytest.raises(ArtifactCorruptError, match="errata.safetensors was altered: its SHA-256"):
        deploy.from_hub(REPO, tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../outside", "*", ".cache/x", "/etc/passwd"])
def test_a_manifest_that_asks_for_other_files(name: str, hub: Hub, artifact: Path, tmp_path: Path) -> None:
    value = json.loads((artifact / "errata.json").read_text())
    value.pop("manifest_sha256")
    value["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    repo_with(
        hub, artifact, **{"errata.json": dumps({**value, "manifest_sha256": digest(value)}), name: b"x"}
    )
    with pytest.raises(ArtifactCorruptError, match="names (a file outside|the file)"):
        deploy.from_hub(REPO, tmp_path / "back")
    assert list(tmp_path.iterdir()) == []


def test_what_the_hub_refuses_is_one_line(
    hub: Hub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ArtifactError, match="cannot fetch 'a/b' at 'v1': Repository Not Found: a/b; check the name"
    ):
        deploy.from_hub("a/b", tmp_path / "back", revision="v1")
    monkeypatch.setattr(hub, "create_repo", lambda *args, **options: 1 / 0)
    with pytest.raises(ArtifactError, match="cannot push .* to 'a/b': division by zero; check the name"):
        deploy.push_to_hub(artifact, "a/b")


def test_a_commit_that_is_a_path(
    hub: Hub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    answer = SimpleNamespace(sha="../../outside", siblings=[])
    monkeypatch.setattr(hub, "model_info", lambda *args, **options: answer)
    with pytest.raises(
        ArtifactError, match="the hub names the commit '../../outside' .* which is not a commit hash"
    ):
        deploy.from_hub(REPO)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_is_refused_before_anything_is_asked(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        deploy.from_hub(REPO, tmp_path)
    assert hub.calls == []


def test_a_signature_goes_along(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    pytest.importorskip("OpenSSL", reason="signing needs the extra `sign`")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    for name in ("maker", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        (tmp_path / f"{name}.pem").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        )
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    deploy.push_to_hub(artifact, REPO)
    with pytest.raises(ArtifactError, match="is not an artifact: errata.sig is not there"):
        deploy.from_hub(REPO, tmp_path / "back", public_key=tmp_path / "maker.pub")
    signature = deploy.sign(artifact, tmp_path / "maker.pem", tmp_path / "artifact.sig")
    with pytest.raises(ArtifactError, match="not made with the private key of"):
        deploy.push_to_hub(artifact, REPO, signature=signature, public_key=tmp_path / "other.pub")
    deploy.push_to_hub(artifact, REPO, signature=signature, public_key=tmp_path / "maker.pub")
    assert hub.files["errata.sig"] == signature.read_bytes()
    with pytest.raises(ArtifactError, match="not made with the private key of"):
        deploy.from_hub(REPO, tmp_path / "back", public_key=tmp_path / "other.pub")
    assert not (tmp_path / "back").exists()
    assert contents(deploy.from_hub(REPO, tmp_path / "back", public_key=tmp_path / "maker.pub")) == contents(
        artifact
    )


def test_the_card_says_what_it_is(artifact: Path) -> None:
    manifest = deploy.verify(artifact)
    text = model_card(manifest, REPO)
    _, metadata, body = text.split("---\n", 2)
    import yaml

    assert yaml.safe_load(metadata) == {
        "library_name": "errata",
        "tags": ["diffusers", "errata", "quantized", "feature-caching"],
    }
    for part in (
        "# digits-w4a8\n", "w4a8+cachequant-2", "56 of w4a8", "DDIMScheduler", "6 steps", manifest.sha256,
        f"{manifest.denoiser_bytes:,} bytes", f'deploy.from_hub("{REPO}")', "errata pull someone/digits-w4a8",
    ):  # fmt: skip
        assert part in body
    assert text == model_card(manifest, REPO)


def test_a_card_of_ones_own(hub: Hub, artifact: Path) -> None:
    deploy.push_to_hub(artifact, REPO, card="# Mine\n")
    assert hub.files["README.md"] == b"# Mine\n"


def test_a_card_is_no_part_of_an_artifact(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    (root / "README.md").write_text("x")
    with pytest.raises(ArtifactCorruptError, match="README.md is not listed in the manifest"):
        deploy.verify(root)
    value = json.loads((root / "errata.json").read_text())
    value.pop("manifest_sha256")
    value["files"]["README.md"] = {"bytes": 1, "sha256": file_digest(root / "README.md")}
    (root / "errata.json").write_bytes(dumps({**value, "manifest_sha256": digest(value)}))
    with pytest.raises(ArtifactCorruptError, match="README.md belongs to no component"):
        deploy.verify(root)


def test_on_the_command_line(
    hub: Hub, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push", str(artifact), REPO, "--private"]) == 0
    assert capsys.readouterr().out == f"pushed: https://hub/{REPO}/commit/{2:040x}\n"
    assert dict(hub.calls)["create_repo"]["private"] is True
    assert cli.main(["pull", REPO, "--out", f"{tmp_path}/back", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"artifact": f"{tmp_path}/back", "manifest_sha256": deploy.verify(artifact).sha256}
    assert contents(tmp_path / "back") == contents(artifact)
    assert cli.main(["pull", "no/body", "--out", f"{tmp_path}/more"]) == 1
    assert "cannot fetch 'no/body'" in capsys.readouterr().err
    assert cli.main(["push", str(artifact), REPO, "--signature", "x"]) == 2
    assert "--signature and --public-key belong together" in capsys.readouterr().err


@pytest.fixture
def sheet(tiny_artifact: Callable[[str], Path], artifact: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sheet.safetensors"
    made_up_sheet(deploy.load(artifact, backend="reference")).save(path)
    return path


def test_a_sheet_goes_beside_its_artifact_and_comes_back(
    hub: Hub, artifact: Path, sheet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deploy.push_to_hub(artifact, REPO)
    before = set(hub.files)
    assert cli.main(["push", f"{sheet}", REPO]) == 0
    assert set(hub.files) == {*before, "errata.sheet.safetensors"}
    assert contents(deploy.from_hub(REPO, tmp_path / "back")) == contents(artifact)
    assert cli.main(["pull", REPO, "--sheet", "--out", f"{tmp_path}/pulled"]) == 0
    assert (tmp_path / "pulled").read_bytes() == sheet.read_bytes()
    assert cli.main(["pull", REPO, "--sheet", "--out", f"{tmp_path}/pulled"]) == 1
    assert "exists; choose another file" in capsys.readouterr().err


def test_a_sheet_is_not_put_beside_another_artifact(
    hub: Hub, tiny_artifact: Callable[[str], Path], sheet: Path, tmp_path: Path
) -> None:
    deploy.push_to_hub(tiny_artifact("deepcache-3"), REPO)
    with pytest.raises(PlanError, match="holds the artifact .* and the sheet was fitted to"):
        push_sheet(sheet, REPO)
    with pytest.raises(ArtifactError, match=r"has no such sheet: errata.sheet.safetensors is not there"):
        sheet_from_hub(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_a_sheet_that_was_changed_on_the_hub_is_refused(
    hub: Hub, artifact: Path, sheet: Path, tmp_path: Path
) -> None:
    deploy.push_to_hub(artifact, REPO)
    push_sheet(sheet, REPO)
    data = hub.files["errata.sheet.safetensors"]
    hub.commits[-1]["errata.sheet.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(PlanError, match="digest does not belong"):
        sheet_from_hub(REPO, tmp_path / "pulled")
    hub.commits[-1]["errata.sheet.safetensors"] = data + bytes(2**20)
    with pytest.raises(ArtifactError, match="allowed are 524,288"):
        sheet_from_hub(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
