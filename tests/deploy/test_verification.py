"""Every way in which an artifact can be damaged, and the message that it earns."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from errata import deploy
from errata.canonical_json import digest, dumps, file_digest
from errata.errors import ArtifactCorrupt, ArtifactError, ArtifactVersionError

Artifact = Callable[[str], Path]
DENOISER = "unet/errata.safetensors"


@pytest.fixture
def artifact(tiny_artifact: Artifact, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_artifact("w4a8"), tmp_path / "artifact"))


def rewrite(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alters the manifest as an attacker would: with a digest that matches again."""
    value = json.loads((root / "errata.json").read_text())
    value.pop("manifest_sha256")
    change(value)
    (root / "errata.json").write_bytes(dumps({**value, "manifest_sha256": digest(value)}))


def relist(root: Path, name: str) -> None:
    record = {"bytes": (root / name).stat().st_size, "sha256": file_digest(root / name)}
    rewrite(root, lambda value: value["files"].update({name: record}))


def retensor(root: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(root / DENOISER)
    change(tensors)
    save_file(tensors, root / DENOISER)
    relist(root, DENOISER)


def refused(root: Path, error: type[ArtifactError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        deploy.verify(root)
    assert caught.type is error
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=message):
        deploy.load(root)


def test_an_untouched_copy_is_accepted(artifact: Path) -> None:
    assert deploy.verify(artifact).recipe.name == "w4a8"


def test_every_altered_byte_of_every_file_is_refused(artifact: Path) -> None:
    for file in [path for path in artifact.rglob("*") if path.is_file()]:
        data = file.read_bytes()
        for position in range(0, len(data), max(1, len(data) // 7)):
            altered = bytearray(data)
            altered[position] ^= 1
            file.write_bytes(altered)
            with pytest.raises(ArtifactError):
                deploy.verify(artifact)
        file.write_bytes(data)
    deploy.verify(artifact)


def test_truncated_and_missing_files(artifact: Path) -> None:
    file = artifact / DENOISER
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    refused(artifact, ArtifactCorrupt, "bytes, the manifest says")
    file.unlink()
    refused(artifact, ArtifactCorrupt, "is missing")


def test_an_altered_file(artifact: Path) -> None:
    file = artifact / "unet" / "config.json"
    file.write_bytes(file.read_bytes().replace(b"1", b"2", 1))
    refused(artifact, ArtifactCorrupt, "was altered: its SHA-256")


def test_unlisted_files_and_links(artifact: Path) -> None:
    (artifact / "unet" / "extra.bin").write_bytes(b"x")
    refused(artifact, ArtifactCorrupt, "extra.bin is not listed in the manifest")
    (artifact / "unet" / "extra.bin").unlink()
    (artifact / "unet" / "extra.bin").symlink_to("/etc/passwd")
    refused(artifact, ArtifactCorrupt, "link or special file")
    (artifact / "unet" / "extra.bin").unlink()
    shutil.move(artifact / "scheduler", artifact.parent / "elsewhere")
    (artifact / "scheduler").symlink_to(artifact.parent / "elsewhere")
    refused(artifact, ArtifactCorrupt, "link or special file")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "unet/../../outside", "unet\\config.json"])
def test_paths_outside_the_artifact(artifact: Path, name: str) -> None:
    record = {"bytes": 1, "sha256": "0"}
    rewrite(artifact, lambda value: value["files"].update({name: record}))
    refused(artifact, ArtifactCorrupt, "names a file outside the artifact")


def test_another_version(artifact: Path) -> None:
    rewrite(artifact, lambda value: value.update(format="errata-artifact/2"))
    refused(artifact, ArtifactVersionError, "format 'errata-artifact/2'; this version reads")


def test_another_denoiser_class(artifact: Path) -> None:
    rewrite(artifact, lambda value: value.update(unet_class="os.system"))
    refused(artifact, ArtifactVersionError, "denoiser class 'os.system'")


@pytest.mark.parametrize("change", [{"pipeline_class": "StableUnknownPipeline"}, {"pipeline_class": "torch"}])
def test_another_pipeline_class(artifact: Path, change: dict[str, str]) -> None:
    rewrite(artifact, lambda value: value.update(change))
    with pytest.raises(ArtifactVersionError, match="is no DiffusionPipeline of diffusers"):
        deploy.load(artifact)


def test_manifests_that_are_none(artifact: Path) -> None:
    file = artifact / "errata.json"
    data = file.read_bytes()
    for content, message in [
        (b"{", "is not valid JSON"),
        (b"[]", "holds a list, not a manifest"),
        (data[:-1] + b" \n", "its own digest does not match"),
        (data.replace(b"w4", b"w8"), "its own digest does not match"),
        (b'{"format":"errata-artifact/1","format":"errata-artifact/1"}', "is not valid JSON"),
    ]:
        if content != data:
            file.write_bytes(content)
            refused(artifact, ArtifactCorrupt, message)
    file.write_bytes(data)
    rewrite(artifact, lambda value: value.update(comment="hello"))
    refused(artifact, ArtifactCorrupt, r"missing or unknown keys: \['comment'\]")
    file.write_bytes(data)
    rewrite(artifact, lambda value: value.pop("sampler"))
    refused(artifact, ArtifactCorrupt, r"missing or unknown keys: \['sampler'\]")
    file.write_bytes(data)
    rewrite(artifact, lambda value: value["schedule"].update(full_steps=["zero"]))
    refused(artifact, ArtifactCorrupt, "is not a readable manifest")
    file.unlink()
    refused(artifact, ArtifactError, "it has no errata.json")
    refused(artifact.parent / "nowhere", ArtifactError, "is not a directory")


def test_tensors_outside_the_scheme(artifact: Path) -> None:
    shape = (16, 16, 3, 3)
    retensor(
        artifact, lambda tensors: tensors.update({"mid_block.resnets.0.conv1.weight": torch.randn(shape)})
    )
    refused(
        artifact,
        ArtifactCorrupt,
        "holds 1 tensors outside the scheme, the first is 'mid_block.resnets.0.conv1",
    )


def test_float_weights_in_the_place_of_codes(artifact: Path) -> None:
    retensor(artifact, lambda tensors: tensors.update({"conv_in.codes": torch.randn(16, 1, 3, 3)}))
    refused(artifact, ArtifactCorrupt, "tensor 'conv_in.codes' is torch.float32")


def test_missing_tensors(artifact: Path) -> None:
    retensor(artifact, lambda tensors: tensors.pop("conv_in.weight_scale"))
    refused(artifact, ArtifactCorrupt, "lacks 1 tensors, the first is 'conv_in.weight_scale'")


def test_tensors_of_another_shape(artifact: Path) -> None:
    retensor(artifact, lambda tensors: tensors.update({"conv_in.input.0.scale": torch.ones(7)}))
    refused(artifact, ArtifactCorrupt, r"'conv_in.input.0.scale' is torch.float32 \(7,\)")


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "holds NaN or infinity"), (float("inf"), "holds NaN or infinity"), (0.0, "not positive")],
)
def test_scales_that_are_no_numbers(artifact: Path, value: float, message: str) -> None:
    retensor(artifact, lambda tensors: tensors["conv_in.input.0.scale"].fill_(value))
    refused(artifact, ArtifactCorrupt, message)


def test_a_denoiser_file_that_is_none(artifact: Path) -> None:
    (artifact / DENOISER).write_bytes(b"\xff" * 64)
    relist(artifact, DENOISER)
    refused(artifact, ArtifactCorrupt, "is not a safetensors file")


def test_a_config_that_describes_another_network(artifact: Path) -> None:
    file = artifact / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["block_out_channels"] = [8, 8]
    file.write_text(json.dumps(config))
    relist(artifact, "unet/config.json")
    refused(artifact, ArtifactCorrupt, "the scheme w4a8 says")
    file.write_text("{")
    relist(artifact, "unet/config.json")
    refused(artifact, ArtifactCorrupt, "does not describe the denoiser")
