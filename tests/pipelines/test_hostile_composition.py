"""A `model_index.json`, or files beside it, that somebody altered: with digests that match again."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from errata import calibration, compress, deploy
from errata.canonical_json import digest, dumps, file_digest
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers 0.42, NumPy 2
Build = Callable[[str], Any]
Index = dict[str, Any]


@pytest.fixture(scope="session")
def pristine(small_pipeline: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a decoder and a class embedder; nothing in it is quantized, for speed."""
    root = tmp_path_factory.mktemp("hostile")
    pipe = small_pipeline("ldm context kl").pipe
    pipe = type(pipe)(**{**pipe.components, "scheduler": small_pipeline("ldm labels vq").pipe.scheduler})
    pipe.set_progress_bar_config(disable=True)
    recorded = calibration.collect(
        pipe,
        root / "set",
        num_inference_steps=2,
        num_samples=1,
        batch_size=1,
        inputs=[{"class_labels": [1]}],
        guidance_scale=2.0,
    )
    compressed = compress.apply(pipe, recorded, "deepcache-2", root / "compressed")
    return deploy.export(compressed, root / "artifact")


@pytest.fixture
def artifact(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "artifact"))


def relist(root: Path) -> None:
    """Lists every file anew, as an attacker would."""
    value = json.loads((root / "errata.json").read_text())
    value.pop("manifest_sha256")
    value["files"] = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in root.rglob("*")
        if path.is_file() and path.name != "errata.json"
    }
    (root / "errata.json").write_bytes(dumps({**value, "manifest_sha256": digest(value)}))


def rewrite_index(root: Path, **changes: Any) -> None:
    file = root / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    relist(root)


def refused(root: Path, error: type[ArtifactError], message: str) -> None:
    for check in (deploy.verify, deploy.load):
        with pytest.raises(error, match=message) as caught:
            check(root)
        assert caught.type is error
        assert "\n" not in str(caught.value)


def test_relisting_alone_changes_nothing(artifact: Path) -> None:
    relist(artifact)
    assert deploy.verify(artifact).pipeline_class == "ClassConditionalLDMPipeline"
    deployed = deploy.load(artifact)
    assert {"made_by", "files"} <= set(deployed.manifest.to_json())
    assert deployed.pipe.class_embedder.unconditional_label == 10


def test_a_foreign_library_is_not_imported(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "foreign_component.py").write_text("class Decoder: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewrite_index(artifact, vae=["foreign_component", "Decoder"])
    refused(
        artifact, ArtifactCorruptError, "component library 'foreign_component' is not allowed; allowed are"
    )
    assert "foreign_component" not in sys.modules


@pytest.mark.parametrize("name", ["DDIMPipeline", "load_image", "Nonsense", "__doc__", "utils.torch_utils"])
def test_a_class_outside_the_list(artifact: Path, name: str) -> None:
    rewrite_index(artifact, vae=["diffusers", name])
    refused(artifact, ArtifactVersionError, f"'diffusers' has no model, .* called '{name}'; update it")


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_pytorch_model.bin", "model.pt", "weights.pkl", "code.py", "model.ckpt", "README",
        "adapter_config.json", "model.safetensors.index.json",
    ],
)  # fmt: skip
def test_a_file_that_may_run_or_redirect(artifact: Path, name: str) -> None:
    (artifact / "vae" / name).write_bytes(b"{}")
    relist(artifact)
    refused(
        artifact, ArtifactCorruptError, f"vae/{name} is not allowed: a component holds .json, .safetensors"
    )


@pytest.mark.parametrize("name", ["unet/more.safetensors", "scheduler/config.json"])
def test_a_file_too_many_beside_our_own(artifact: Path, name: str) -> None:
    (artifact / name).write_bytes(b"{}")
    relist(artifact)
    refused(artifact, ArtifactCorruptError, f"{name} is not allowed")


def test_a_missing_component_folder(artifact: Path) -> None:
    shutil.rmtree(artifact / "vae")
    relist(artifact)
    refused(artifact, ArtifactCorruptError, "has no files of component 'vae'; copy the artifact again")


def test_a_component_too_many(artifact: Path) -> None:
    shutil.copytree(artifact / "vae", artifact / "second")
    relist(artifact)
    refused(artifact, ArtifactCorruptError, "second/config.json belongs to no component of model_index.json")
    rewrite_index(artifact, second=["diffusers", "AutoencoderKL"])
    refused(artifact, ArtifactCorruptError, "ClassConditionalLDMPipeline does not take 'second'")


def test_files_in_odd_places(artifact: Path) -> None:
    (artifact / "vae" / "deeper").mkdir()
    (artifact / "vae" / "deeper" / "config.json").write_bytes(b"{}")
    relist(artifact)
    refused(artifact, ArtifactCorruptError, "deeper/config.json belongs to no component")
    shutil.rmtree(artifact / "vae" / "deeper")
    (artifact / "notes.txt").write_bytes(b"")
    relist(artifact)
    refused(artifact, ArtifactCorruptError, "notes.txt belongs to no component")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae": None}, "ClassConditionalLDMPipeline does not take 'vae'"),
        ({"vae": [None, None]}, "does not make a ClassConditionalLDMPipeline: model_index.json has no 'vae'"),
        ({"unconditional_label": ["diffusers", "VQModel"]}, "does not take 'unconditional_label'"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "'unet' is 'UNet2DModel', errata.json says 'UNet2DCond"),
        (
            {"scheduler": [None, None]},
            "does not make a ClassConditionalLDMPipeline: model_index.json has no 'sch",
        ),
        ({"unconditional_label": [1, 2, 3]}, "'unconditional_label' is neither a component nor a setting"),
        ({"unconditional_label": ["1", 2]}, "'unconditional_label' is neither a component nor a setting"),
        ({"guidance_scale": 3.0}, "ClassConditionalLDMPipeline does not take 'guidance_scale'"),
        ({"_class_name": 3}, "pipeline_class does not fit"),
    ],
)
def test_an_index_that_does_not_fit(artifact: Path, change: Index, message: str) -> None:
    rewrite_index(artifact, **change)
    refused(artifact, ArtifactCorruptError, message)


def test_an_index_without_a_component(artifact: Path) -> None:
    file = artifact / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in index.items() if key != "vae"}))
    shutil.rmtree(artifact / "vae")
    relist(artifact)
    refused(artifact, ArtifactCorruptError, "model_index.json has no 'vae'; deploy again")
    file.write_text("[]")
    relist(artifact)
    refused(artifact, ArtifactCorruptError, "model_index.json holds a list, not an object")
    file.write_text("{")
    relist(artifact)
    refused(artifact, ArtifactCorruptError, "model_index.json is not valid JSON")


def test_settings_that_lead_elsewhere(artifact: Path) -> None:
    file = artifact / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_name_or_path": "someone/model"}))
    relist(artifact)
    refused(
        artifact,
        ArtifactCorruptError,
        "vae/config.json has a setting that names a file, a model or a program",
    )
    file.write_text(json.dumps("someone/model"))
    relist(artifact)
    refused(artifact, ArtifactCorruptError, "vae/config.json holds a str, not an object")


def test_weights_that_do_not_fit_their_settings(artifact: Path) -> None:
    file = artifact / "class_embedder" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for altered, message in [
        ({}, "the weights lack 'embedding.weight'"),
        ({"embedding.weight": torch.zeros(3, 16)}, r"'embedding.weight' is torch.float32 \(3, 16\), not"),
        ({**tensors, "more": torch.zeros(1)}, "the weights have 'more'"),
    ]:
        save_file(altered, file)
        relist(artifact)
        refused(artifact, ArtifactCorruptError, f"class_embedder does not make a ClassEmbedder: {message}")
