"""Signatures beside artifacts: whose they are, and what they do not hold for."""

import base64
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata import cli, deploy
from errata.canonical_json import digest, dumps
from errata.errors import ArtifactCorruptError, ArtifactError

pytest.importorskip("OpenSSL", reason="signing needs the extra `sign`")
pytest.importorskip("model_signing", reason="signing needs the extra `sign`")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

PASSWORD = "correct horse"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs `maker`, `other`, `locked` (with a password), and two of kinds that cannot be used."""
    folder = tmp_path_factory.mktemp("keys")
    plain = serialization.NoEncryption()
    for name, key, lock in (
        ("maker", ec.generate_private_key(ec.SECP256R1()), plain),
        ("other", ec.generate_private_key(ec.SECP256R1()), plain),
        (
            "locked",
            ec.generate_private_key(ec.SECP384R1()),
            serialization.BestAvailableEncryption(PASSWORD.encode()),
        ),
        ("edwards", ed25519.Ed25519PrivateKey.generate(), plain),
        ("bitcoin", ec.generate_private_key(ec.SECP256K1()), plain),
    ):
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub").write_bytes(public)
    (folder / "garbage.pem").write_bytes(b"\xff" * 40)
    return folder


@pytest.fixture
def artifact(tiny_artifact: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact("w4a8"), tmp_path / "artifact"))


@pytest.fixture
def signature(artifact: Path, keys: Path, tmp_path: Path) -> Path:
    return deploy.sign(artifact, keys / "maker.pem", tmp_path / "artifact.sig")


def refused(
    artifact: Path, signature: Path, key: Path, message: str, kind: type[ArtifactError] = ArtifactCorruptError
) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        deploy.verify(artifact, signature=signature, public_key=key)
    assert caught.type is kind
    assert "\n" not in str(caught.value)


def resigned(root: Path, **changes: Any) -> None:
    """Alters the manifest and makes its own digest right: `verify` alone cannot tell."""
    value = json.loads((root / "errata.json").read_text())
    value.pop("manifest_sha256")
    value.update(changes)
    (root / "errata.json").write_bytes(dumps({**value, "manifest_sha256": digest(value)}))


def test_a_signature_holds_wherever_the_artifact_goes(artifact: Path, signature: Path, keys: Path) -> None:
    plain = deploy.verify(artifact)
    moved = artifact.rename(artifact.with_name("under another name"))
    found = deploy.verify(moved, signature=signature, public_key=keys / "maker.pub")
    assert found.sha256 == plain.sha256
    assert signature.parent == moved.parent
    assert not list(moved.rglob("*.sig"))


def test_a_key_with_a_password(artifact: Path, keys: Path, tmp_path: Path) -> None:
    out = tmp_path / "locked.sig"
    with pytest.raises(ArtifactError, match="locked.pem is encrypted; give its password"):
        deploy.sign(artifact, keys / "locked.pem", out)
    with pytest.raises(ArtifactError, match="locked.pem is not a usable private key"):
        deploy.sign(artifact, keys / "locked.pem", out, password="wrong")
    assert not out.exists()
    deploy.sign(artifact, keys / "locked.pem", out, password=PASSWORD)
    deploy.verify(artifact, signature=out, public_key=keys / "locked.pub")


def test_another_key(artifact: Path, signature: Path, keys: Path) -> None:
    refused(
        artifact, signature, keys / "other.pub", "not made with the private key of .*other.pub", ArtifactError
    )


def test_an_artifact_made_to_look_right(artifact: Path, signature: Path, keys: Path) -> None:
    calibration = deploy.verify(artifact).calibration
    resigned(artifact, calibration={**calibration, "num_samples": 9})
    deploy.verify(artifact)
    refused(artifact, signature, keys / "maker.pub", "is of another artifact than .*: 'errata.json' is not")


def test_another_artifact(signature: Path, keys: Path, tiny_artifact: Callable[[str], Path]) -> None:
    refused(tiny_artifact("w8a8"), signature, keys / "maker.pub", "is of another artifact than ")


def test_a_signature_does_not_excuse_damage(artifact: Path, signature: Path, keys: Path) -> None:
    (artifact / "unet" / "config.json").write_bytes(b"{}")
    refused(artifact, signature, keys / "maker.pub", "config.json has 2 bytes, the manifest says")


def payload_of(bundle: Any) -> Any:
    return json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))


def with_payload(bundle: Any, **changes: Any) -> None:
    text = json.dumps({**payload_of(bundle), **changes}).encode()
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(text).decode()


DAMAGE: dict[str, tuple[Callable[[Any], object], str]] = {
    "another payload": (lambda bundle: with_payload(bundle, extra=1), "is damaged: it is not valid for"),
    "another signature": (
        lambda bundle: bundle["dsseEnvelope"]["signatures"][0].update(sig="MAYCAQECAQE="), "is damaged: "
    ),
    "no signatures": (lambda bundle: bundle["dsseEnvelope"].update(signatures=[]), "is damaged, .* not one"),
    "two signatures": (
        lambda bundle: bundle["dsseEnvelope"]["signatures"].extend(bundle["dsseEnvelope"]["signatures"]),
        "is damaged, .* not one signature",
    ),
    "no key": (lambda bundle: bundle["verificationMaterial"].clear(), "is damaged, or was not"),
    "an unnamed key": (
        lambda bundle: bundle["verificationMaterial"]["publicKey"].pop("hint"), "is damaged, or was not"
    ),
    "nothing": (lambda bundle: bundle.clear(), "is damaged, or was not written by `errata sign`"),
    "no payload": (lambda bundle: bundle["dsseEnvelope"].update(payload="*"), "is damaged, or was not"),
    "a payload of another kind": (
        lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"), "is damaged: it is not valid"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_signature(name: str, artifact: Path, signature: Path, keys: Path) -> None:
    change, message = DAMAGE[name]
    bundle = json.loads(signature.read_text())
    change(bundle)
    signature.write_text(json.dumps(bundle))
    refused(artifact, signature, keys / "maker.pub", message)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[]", b"[" * 10**5, b" " * 2**21])
def test_a_signature_that_is_none(data: bytes, artifact: Path, signature: Path, keys: Path) -> None:
    signature.write_bytes(data)
    refused(artifact, signature, keys / "maker.pub", "artifact.sig is damaged, or was not written by")


def test_a_signature_that_leaves_files_out(artifact: Path, signature: Path, keys: Path) -> None:
    """As `model-signing` makes them when asked to ignore a path."""
    from model_signing import hashing, signing

    config = signing.Config().use_elliptic_key_signer(private_key=keys / "maker.pem")
    left_out = hashing.Config().set_ignored_paths(paths=["errata.json"])
    config.set_hashing_config(left_out).sign(artifact, signature)
    refused(artifact, signature, keys / "maker.pub", "artifact.sig does not cover errata.json")


def test_the_library_alone_accepts_it_too(artifact: Path, signature: Path, keys: Path) -> None:
    from model_signing import verifying

    verifying.Config().use_elliptic_key_verifier(public_key=keys / "maker.pub").verify(artifact, signature)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("edwards", "edwards.{} is not a usable {} key"),
        ("bitcoin", "bitcoin.{} is not a usable {} key: Unsupported key for curve 'secp256k1'"),
        ("garbage", "garbage.{} is not a usable {} key|cannot read the key"),
        ("missing", "cannot read the key .*missing.{}: No such file"),
    ],
)
def test_keys_that_cannot_be_used(
    name: str, message: str, artifact: Path, signature: Path, keys: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=message.format("pem", "private")):
        deploy.sign(artifact, keys / f"{name}.pem", tmp_path / "new.sig")
    refused(artifact, signature, keys / f"{name}.pub", message.format("pub", "public"), ArtifactError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "artifact.sig"]


def test_places_for_a_signature(artifact: Path, signature: Path, keys: Path, tmp_path: Path) -> None:
    for place, message in [
        (artifact / "artifact.sig", "is inside the artifact, .* beside it, as artifact.sig"),
        (artifact / "unet" / ".." / "x.sig", "is inside the artifact"),
        (signature, "artifact.sig exists; choose another file"),
        (tmp_path / "none" / "x.sig", "none is not a directory; create it first"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            deploy.sign(artifact, keys / "maker.pem", place)
    deploy.verify(artifact)


def test_a_broken_artifact_is_not_signed(artifact: Path, keys: Path, tmp_path: Path) -> None:
    (artifact / "unet" / "errata.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactCorruptError, match="has 1 bytes, the manifest says"):
        deploy.sign(artifact, keys / "maker.pem", tmp_path / "x.sig")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_both_or_neither(artifact: Path, signature: Path, keys: Path) -> None:
    for options in ({"signature": signature}, {"public_key": keys / "maker.pub"}):
        with pytest.raises(ArtifactError, match="signature and public_key belong together; give both"):
            deploy.verify(artifact, **options)
    refused(
        artifact, signature.with_name("none.sig"), keys / "maker.pub", "none.sig is not a file", ArtifactError
    )


def test_without_the_package_the_message_names_the_extra(
    artifact: Path, signature: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    message = "signatures need model-signing .*; `pip install 'errata\\[sign\\]'`"
    refused(artifact, signature, keys / "maker.pub", message, ArtifactError)
    with pytest.raises(ArtifactError, match=message):
        deploy.sign(artifact, keys / "maker.pem", tmp_path / "new.sig")
    deploy.verify(artifact)


def test_on_the_command_line(
    artifact: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signature, public = f"{tmp_path}/artifact.sig", f"{keys}/locked.pub"
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    sign = ["sign", str(artifact), "--key", f"{keys}/locked.pem", "--out", signature]
    assert cli.main(sign) == 1
    assert "is encrypted; give its password" in capsys.readouterr().err
    assert cli.main([*sign, "--password-file", f"{tmp_path}/password"]) == 0
    assert capsys.readouterr().out == f"signature: {signature}\n"
    check = ["verify", str(artifact), "--signature", signature]
    assert cli.main([*check, "--public-key", public]) == 0
    assert f"signed by the owner of {public}" in capsys.readouterr().out
    assert cli.main([*check, "--public-key", public, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signed"] is True
    assert cli.main([*check, "--public-key", f"{keys}/other.pub"]) == 1
    assert "not made with the private key of" in capsys.readouterr().err
    assert cli.main(check) == 2
    assert "--signature and --public-key belong together" in capsys.readouterr().err
