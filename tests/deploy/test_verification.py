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
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError

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


def rename_pipeline(root: Path, name: str) -> None:
    file = root / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": name}))
    relist(root, "model_index.json")
    rewrite(root, lambda value: value.update(pipeline_class=name))


def refused(root: Path, error: type[ArtifactError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        deploy.verify(root)
    assert caught.type is error
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match=message):
        deploy.load(root)


def test_an_untouched_copy_is_accepted(artifact: Path) -> None:
    assert deploy.verify(artifact).recipe.name == "w4a8"


def test_the_path_to_an_artifact_may_lead_through_a_link(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(artifact)
    assert deploy.verify(tmp_path / "current").sha256 == deploy.verify(artifact).sha256


def test_altered_bytes_all_over_every_file_are_refused(artifact: Path) -> None:
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
    refused(artifact, ArtifactCorruptError, "bytes, the manifest says")
    file.unlink()
    refused(artifact, ArtifactCorruptError, "is missing")


def test_an_altered_file(artifact: Path) -> None:
    file = artifact / "unet" / "config.json"
    file.write_bytes(file.read_bytes().replace(b"1", b"2", 1))
    refused(artifact, ArtifactCorruptError, "was altered: its SHA-256")


def test_unlisted_files_and_links(artifact: Path) -> None:
    (artifact / "unet" / "extra.bin").write_bytes(b"x")
    refused(artifact, ArtifactCorruptError, "extra.bin is not listed in the manifest")
    (artifact / "unet" / "extra.bin").unlink()
    (artifact / "unet" / "extra.bin").symlink_to("/etc/passwd")
    refused(artifact, ArtifactCorruptError, "link or special file")
    (artifact / "unet" / "extra.bin").unlink()
    shutil.move(artifact / "scheduler", artifact.parent / "elsewhere")
    (artifact / "scheduler").symlink_to(artifact.parent / "elsewhere")
    refused(artifact, ArtifactCorruptError, "link or special file")


def test_empty_directories(artifact: Path) -> None:
    (artifact / "vae").mkdir()
    refused(artifact, ArtifactCorruptError, "vae is an empty directory")


def test_files_that_cannot_be_read(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("errata.deploy.inventory.file_digest", deny)
    refused(artifact, ArtifactError, "cannot read .*: Permission denied; make it readable")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "unet/../../outside", "unet\\config.json"])
def test_paths_outside_the_artifact(artifact: Path, name: str) -> None:
    record = {"bytes": 1, "sha256": "0"}
    rewrite(artifact, lambda value: value["files"].update({name: record}))
    refused(artifact, ArtifactCorruptError, "names a file outside the artifact")


def test_another_version(artifact: Path) -> None:
    rewrite(artifact, lambda value: value.update(format="errata-artifact/3"))
    refused(artifact, ArtifactVersionError, "format 'errata-artifact/3'; this version reads")


def test_another_denoiser_class(artifact: Path) -> None:
    rewrite(artifact, lambda value: value.update(unet_class="os.system"))
    refused(artifact, ArtifactVersionError, "denoiser class 'os.system'")


@pytest.mark.parametrize("change", [{"pipeline_class": "StableUnknownPipeline"}, {"pipeline_class": "torch"}])
def test_another_pipeline_class(artifact: Path, change: dict[str, str]) -> None:
    rewrite(artifact, lambda value: value.update(change))
    refused(artifact, ArtifactCorruptError, "pipeline_class does not fit")
    rename_pipeline(artifact, change["pipeline_class"])
    refused(artifact, ArtifactVersionError, "is not a DiffusionPipeline of diffusers")


def test_manifests_that_are_none(artifact: Path) -> None:
    file = artifact / "errata.json"
    data = file.read_bytes()
    for content, message in [
        (b"{", "is not valid JSON"),
        (b"[]", "holds a list, not a manifest"),
        (data[:-1] + b" \n", "its own digest does not match"),
        (data.replace(b'"weight_bits":4', b'"weight_bits":8'), "its own digest does not match"),
        (data.replace(b"DDIM", rb"\ud800"), "its own digest does not match"),
        (b'{"format":"errata-artifact/1","format":"errata-artifact/1"}', "is not valid JSON"),
    ]:
        assert content != data
        file.write_bytes(content)
        refused(artifact, ArtifactCorruptError, message)
    file.write_bytes(data)
    rewrite(artifact, lambda value: value.update(comment="hello"))
    refused(artifact, ArtifactCorruptError, r"has unknown keys: \['comment'\]")
    file.write_bytes(data)
    rewrite(artifact, lambda value: value.pop("sampler"))
    refused(artifact, ArtifactCorruptError, r"has no keys \['sampler'\]")
    file.write_bytes(data)
    rewrite(artifact, lambda value: value["schedule"].update(full_steps=["zero"]))
    refused(artifact, ArtifactCorruptError, "is not a readable manifest")
    file.write_bytes(data)
    rewrite(artifact, lambda value: value["files"]["model_index.json"].update(bytes="many"))
    refused(artifact, ArtifactCorruptError, "is not a readable manifest")
    file.write_bytes(data)
    rewrite(artifact, lambda value: value["files"].update({"x" * 300: {"bytes": 1, "sha256": "0"}}))
    refused(artifact, ArtifactCorruptError, "is missing")
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
        ArtifactCorruptError,
        "holds 1 tensors that are not in the scheme; the first is 'mid_block.resnets.0.conv1",
    )


def test_float_weights_in_the_place_of_codes(artifact: Path) -> None:
    retensor(artifact, lambda tensors: tensors.update({"conv_in.codes": torch.randn(16, 1, 3, 3)}))
    refused(artifact, ArtifactCorruptError, "tensor 'conv_in.codes' is torch.float32")


def test_missing_tensors(artifact: Path) -> None:
    retensor(artifact, lambda tensors: tensors.pop("conv_in.weight_scale"))
    refused(
        artifact, ArtifactCorruptError, "1 tensors are missing from .*; the first is 'conv_in.weight_scale'"
    )


def test_tensors_of_another_shape(artifact: Path) -> None:
    retensor(artifact, lambda tensors: tensors.update({"conv_in.input.0.scale": torch.ones(7)}))
    refused(artifact, ArtifactCorruptError, r"'conv_in.input.0.scale' is torch.float32 \(7,\)")


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "holds NaN or infinity"), (float("inf"), "holds NaN or infinity"), (0.0, "not positive")],
)
def test_scales_that_are_no_numbers(artifact: Path, value: float, message: str) -> None:
    retensor(artifact, lambda tensors: tensors["conv_in.input.0.scale"].fill_(value))
    refused(artifact, ArtifactCorruptError, message)


def test_a_denoiser_file_that_is_none(artifact: Path) -> None:
    (artifact / DENOISER).write_bytes(b"\xff" * 64)
    relist(artifact, DENOISER)
    refused(artifact, ArtifactCorruptError, "is not a safetensors file")


def test_a_config_that_describes_another_network(artifact: Path) -> None:
    file = artifact / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["block_out_channels"] = [8, 8]
    file.write_text(json.dumps(config))
    relist(artifact, "unet/config.json")
    refused(artifact, ArtifactCorruptError, "scheme does not fit the recipe w4a8")
    file.write_text("{")
    relist(artifact, "unet/config.json")
    refused(artifact, ArtifactCorruptError, "unet/config.json is not valid JSON")


@pytest.mark.parametrize("text", ["google/ddpm-cifar10-32", "../elsewhere"])
def test_a_config_that_names_a_place_is_not_followed(artifact: Path, text: str) -> None:
    (artifact / "unet" / "config.json").write_text(json.dumps(text))
    relist(artifact, "unet/config.json")
    refused(artifact, ArtifactCorruptError, "unet/config.json holds a str, not an object")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda value: value["scheme"].update(layers=[], attentions=[]), "scheme"),
        (lambda value: value["scheme"]["layers"].pop(), "scheme"),
        (lambda value: value["scheme"]["layers"][3].update(weight_bits=16), "scheme"),
        (lambda value: value["scheme"]["attentions"][0].update(bits=2), "scheme"),
        (lambda value: value["recipe"]["quantization"].update(weight_bits=8), "scheme"),
        (lambda value: value["schedule"].update(branch=9), "schedule"),
        (lambda value: value["sampler"].update(timesteps=[1.0, 2.0]), "timesteps"),
        (lambda value: value["sampler"].update(num_inference_steps=-3), "num_inference_steps"),
        (lambda value: value.update(float32_weight_bytes=0), "float32_weight_bytes"),
        (lambda value: value["scheduler_config"].update(clip_sample=True), "scheduler_config"),
        (lambda value: value["sampler"].update(scheduler_class="PNDMScheduler"), "scheduler_class"),
    ],
)
def test_a_manifest_that_contradicts_itself(
    artifact: Path, change: Callable[[dict[str, Any]], object], name: str
) -> None:
    rewrite(artifact, change)
    refused(artifact, ArtifactCorruptError, f"{name} does not fit the recipe")


def test_float_weights_behind_a_shortened_scheme(artifact: Path) -> None:
    """The declared scheme leaves a layer out and the file holds its float weight instead: still refused."""
    layer = "mid_block.resnets.0.conv1"
    names = [name for name in load_file(artifact / DENOISER) if name.startswith(f"{layer}.")]

    def smuggle(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            tensors.pop(name)
        tensors[f"{layer}.weight"] = torch.randn(16, 16, 3, 3)
        tensors[f"{layer}.bias"] = torch.randn(16)

    def leave_out(value: dict[str, Any]) -> None:
        layers = value["scheme"]["layers"]
        value["scheme"]["layers"] = [entry for entry in layers if entry["name"] != layer]

    retensor(artifact, smuggle)
    rewrite(artifact, leave_out)
    refused(artifact, ArtifactCorruptError, "scheme does not fit the recipe w4a8")


def test_codes_outside_the_symmetric_range(artifact: Path) -> None:
    retensor(artifact, lambda tensors: tensors["conv_in.codes"].fill_(-128))
    refused(artifact, ArtifactCorruptError, "'conv_in.codes' holds a code outside the symmetric range")


def test_packed_codes_outside_the_symmetric_range(artifact: Path) -> None:
    retensor(artifact, lambda tensors: tensors["mid_block.resnets.0.conv1.codes"].fill_(0x80))
    refused(artifact, ArtifactCorruptError, "'mid_block.resnets.0.conv1.codes' holds a code outside")


def test_half_precision_beside_quantized_layers(artifact: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors["conv_norm_out.weight"] = tensors["conv_norm_out.weight"].half()

    retensor(artifact, halve)
    refused(artifact, ArtifactCorruptError, "'conv_norm_out.weight' is torch.float16")


def test_a_scheduler_that_diffusers_cannot_make(artifact: Path) -> None:
    file = artifact / "scheduler" / "scheduler_config.json"
    config = {**json.loads(file.read_text()), "beta_schedule": "nope"}
    file.write_text(json.dumps(config))
    relist(artifact, "scheduler/scheduler_config.json")
    rewrite(artifact, lambda value: value.update(scheduler_config=config))
    refused(artifact, ArtifactCorruptError, "scheduler does not make a DDIMScheduler: nope")


def test_a_pipeline_that_needs_more_components(artifact: Path) -> None:
    rename_pipeline(artifact, "LDMPipeline")
    refused(artifact, ArtifactCorruptError, "does not make a LDMPipeline: model_index.json has no 'vqvae'")
