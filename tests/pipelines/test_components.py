"""Every component of every pipeline comes back as it was, from bytes that are always the same."""

import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from errata import calibration, compress, deploy
from errata.deploy.allowlist import component_class, entry_of
from errata.deploy.component_files import check_component
from errata.deploy.components import load_component, write_component
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError

Build = Callable[[str], Any]
NAMES = [
    "ldm labels vq", "ldm context kl", "sd 1", "sdxl", "sd upscale", "sd latent upscale", "audioldm2",
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers 0.42, NumPy 2


def stored(component: Any, folder: Path) -> Any:
    write_component(component, folder)
    check_component(folder)
    return load_component(folder, component_class(*entry_of(component)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_of_stored_components_draws_the_same(
    name: str, small_pipeline: Build, tmp_path: Path
) -> None:
    small = small_pipeline(name)
    pipe, randomness = small.pipe, torch.get_rng_state()
    made = {"unet": pipe.unet}
    for component, value in pipe.components.items():
        if component not in made:
            made[component] = None if value is None else stored(value, tmp_path / "once" / component)
            assert value is None or type(made[component]) is type(value)
    assert torch.equal(torch.get_rng_state(), randomness)
    taken = set(inspect.signature(type(pipe).__init__).parameters) & set(pipe.config)
    again = type(pipe)(**made, **{key: pipe.config[key] for key in taken - set(made)})
    again.set_progress_bar_config(disable=True)
    expected, found = (
        small.draw(functools.partial(each, num_inference_steps=2), 0) for each in (pipe, again)
    )
    assert torch.equal(found, expected)


def test_no_path_of_this_machine_is_stored(small_pipeline: Build, tmp_path: Path) -> None:
    pipe = small_pipeline("sd 1").pipe
    pipe.save_pretrained(tmp_path / "saved")
    opened = type(pipe).from_pretrained(tmp_path / "saved")
    for name in ("vae", "text_encoder", "tokenizer", "scheduler"):
        write_component(pipe.components[name], tmp_path / "made" / name)
        write_component(opened.components[name], tmp_path / "opened" / name)
    assert not [
        name for name, data in contents(tmp_path / "opened").items() if str(tmp_path).encode() in data
    ]
    assert contents(tmp_path / "opened") == contents(tmp_path / "made")


def test_an_artifact_has_the_same_bytes_however_it_came_about(small_pipeline: Build, tmp_path: Path) -> None:
    small = small_pipeline("sd 1")
    inputs = {"prompt": ["a b"], "guidance_scale": 3.0}
    recorded = calibration.collect(
        small.pipe, tmp_path / "set", num_inference_steps=2, num_samples=1, batch_size=1, inputs=[inputs]
    )
    compressed = compress.apply(small.pipe, recorded, "deepcache-2", tmp_path / "compressed")
    direct = contents(deploy.export(compressed, tmp_path / "direct"))
    opened = compress.load(tmp_path / "compressed")
    opened(prompt="c", output_type="latent")
    assert contents(deploy.export(opened, tmp_path / "stored")) == direct
    assert not [name for name, data in direct.items() if str(tmp_path).encode() in data]
    assert deploy.verify(tmp_path / "direct").made_by["transformers"]


@pytest.mark.parametrize(
    ("name", "component"), [("sd 1", "tokenizer"), ("audioldm2", "tokenizer"), ("audioldm2", "tokenizer_2")]
)
def test_a_tokenizer_has_the_same_bytes_after_use(
    name: str, component: str, small_pipeline: Build, tmp_path: Path
) -> None:
    tokenizer = small_pipeline(name).pipe.components[component]
    unused = stored(tokenizer, tmp_path / "unused")
    unused(["a", "a b c"], padding="max_length", max_length=5, truncation=True, return_tensors="pt")
    used = stored(unused, tmp_path / "used")
    unused.save_pretrained(tmp_path / "elsewhere")
    write_component(type(unused).from_pretrained(tmp_path / "elsewhere"), tmp_path / "opened")
    assert contents(tmp_path / "unused") == contents(tmp_path / "used") == contents(tmp_path / "opened")
    assert used("a b c").input_ids == unused("a b c").input_ids == tokenizer("a b c").input_ids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_floating_types_are_kept(dtype: torch.dtype, small_pipeline: Build, tmp_path: Path) -> None:
    parts = small_pipeline("audioldm2").pipe.components
    for name in ("vae", "text_encoder_2", "projection_model", "language_model", "vocoder"):
        write_component(parts[name], tmp_path / "float" / name)
        model = load_component(tmp_path / "float" / name, type(parts[name])).to(dtype)
        if name == "text_encoder_2":  # as T5 is kept: its last projections overflow in float16
            model.encoder.block[0].layer[1].DenseReluDense.wo.float()
        again = stored(model, tmp_path / "half" / name)
        expected = model.state_dict()
        assert {key: value.dtype for key, value in again.state_dict().items()} == {
            key: value.dtype for key, value in expected.items()
        }
        assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


def test_infinite_settings_survive(tmp_path: Path) -> None:
    scheduler = stored(DPMSolverMultistepScheduler(), tmp_path / "scheduler")
    assert scheduler.config.lambda_min_clipped == float("-inf")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    assert json.loads(file.read_bytes())["lambda_min_clipped"] == {"$float": "-inf"}


def test_missing_weights_are_not_invented(small_pipeline: Build, tmp_path: Path) -> None:
    """Transformers fills gaps with random numbers, and only mentions it."""
    from safetensors.torch import load_file, save_file

    encoder = small_pipeline("sd 1").pipe.text_encoder
    write_component(encoder, tmp_path / "text_encoder")
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="text_encoder has missing keys: "):
        load_component(tmp_path / "text_encoder", type(encoder))


def test_what_cannot_be_stored(small_pipeline: Build, tmp_path: Path) -> None:
    encoder = small_pipeline("sd 1").pipe.text_encoder

    class Own(type(encoder)):  # type: ignore[misc]
        """Code that no artifact carries."""

    with pytest.raises(ArtifactError, match="Own cannot be deployed: an artifact names only classes of diff"):
        entry_of(Own(encoder.config))
    with pytest.raises(ArtifactError, match=r"a builtins.dict cannot be deployed"):
        entry_of({})


@pytest.mark.parametrize(
    "setting",
    [
        {"_name_or_path": "/home/someone/model"},
        {"auto_map": {"AutoModel": "code.Model"}},
        {"text_config": {"attn_implementation": "someone/kernel"}},
        {"vocab_file": "/etc/passwd"},
        {"quantization_config": {"quant_method": "awq"}},
    ],
)
def test_settings_that_lead_elsewhere_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    write_component(DPMSolverMultistepScheduler(), tmp_path)
    check_component(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(setting))
    with pytest.raises(
        ArtifactCorruptError, match="config.json has a setting that names a file, a model or a pro"
    ):
        check_component(tmp_path)


@pytest.mark.parametrize("library", ["os", "diffusers.models", "errata", "errata.deploy", "..", ""])
def test_only_listed_libraries_are_imported(library: str) -> None:
    with pytest.raises(
        ArtifactCorruptError, match="is not allowed; allowed are diffusers, errata.pipelines, transf"
    ):
        component_class(library, "AutoencoderKL")


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("diffusers", "DDIMPipeline"),
        ("diffusers", "DiffusionPipeline"),
        ("diffusers", "load_pipeline"),
        ("diffusers", "models.AutoencoderKL"),
        ("diffusers", "__class__"),
        ("transformers", "pipeline"),
        ("transformers", "AutoModel"),
        ("audioldm2", "AudioLDM2Pipeline"),
        ("audioldm2", "importlib"),
        ("errata.pipelines", "ClassConditionalLDMPipeline"),
    ],
)
def test_only_components_are_found(library: str, name: str) -> None:
    if library in ("transformers", "audioldm2"):
        pytest.importorskip("transformers")
    with pytest.raises(ArtifactVersionError, match="has no model, scheduler, tokenizer or processor called"):
        component_class(library, name)


def test_without_transformers_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ArtifactError, match="has a CLIPTextModel, which needs transformers; `pip install 'errat"
    ):
        component_class("transformers", "CLIPTextModel")
