import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from errata import calibration, compress
from errata.calibration import CalibrationSet, model_fingerprint
from errata.canonical_json import file_digest
from errata.compress import CompressedPipeline, Recipe
from errata.compress.jobs.preparation import branch_of
from errata.errors import ArtifactMismatchError, CalibrationError, RecipeError
from errata.runtime.scheme import sites_of

Make = Callable[[str], CompressedPipeline]


def images(pipeline: DDIMPipeline | CompressedPipeline, **kwargs: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.as_tensor(pipeline(batch_size=2, generator=generator, output_type="np", **kwargs).images)


def test_the_float_pipeline_is_left_as_it_was(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    before = images(tiny_pipeline, num_inference_steps=6)
    unet = tiny_pipeline.unet
    names = [name for name, _ in unet.named_modules()]
    compress.apply(tiny_pipeline, tiny_calibration, "w4a8+deepcache-3", tmp_path / "out")
    assert tiny_pipeline.unet is unet
    assert [name for name, _ in unet.named_modules()] == names
    assert torch.equal(images(tiny_pipeline, num_inference_steps=6), before)


def test_every_quantizer_has_a_range_at_every_step_even_where_the_cache_skips_it(
    tiny_compressed: Make,
) -> None:
    compressed = tiny_compressed("w8a8+deepcache-3")
    compression = compressed.compression
    sites = sites_of(compression.scheme)
    assert len(sites) > 20
    for site in sites:
        assert compression.table[f"{site.name}.scale"].shape == (6,)
        assert (compression.table[f"{site.name}.scale"] > 0).all()
    x = torch.randn(1, 1, 8, 8)
    for step in range(6):
        assert torch.isfinite(compressed.denoiser.full(x, step, {})[0]).all()


def test_the_scheme_is_that_of_the_recipe(tiny_compressed: Make) -> None:
    layers = {layer.name: layer for layer in tiny_compressed("w4a8").compression.scheme.layers}
    assert layers["conv_in"].label() == layers["conv_out"].label() == "w8a8"
    assert layers["time_embedding.linear_1"].label() == "w8 (float input)"
    assert layers["down_blocks.0.resnets.0.time_emb_proj"].label() == "w8 (float input)"
    assert layers["mid_block.resnets.0.conv1"].label() == "w4a8"
    assert layers["up_blocks.1.resnets.0.conv1"].input_widths == (16, 16)
    assert layers["down_blocks.1.attentions.0.to_q"].kind == "linear"


def test_an_interval_of_one_is_no_cache(tiny_compressed: Make) -> None:
    assert torch.equal(images(tiny_compressed("w8a8+deepcache-1")), images(tiny_compressed("w8a8")))


def test_a_cache_only_recipe_with_interval_one_is_the_float_pipeline(
    tiny_compressed: Make, tiny_pipeline: DDIMPipeline
) -> None:
    float_images = images(tiny_pipeline, num_inference_steps=6)
    assert torch.equal(images(tiny_compressed("deepcache-1")), float_images)
    assert (images(tiny_compressed("deepcache-3")) - float_images).abs().max() > 1e-3


def test_error_grows_as_bits_fall(
    tiny_compressed: Make, tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet
) -> None:
    record = next(tiny_calibration.batches(2))
    with torch.no_grad():
        exact = tiny_pipeline.unet(record.sample, int(tiny_calibration.timesteps[2])).sample
    errors = {
        recipe: float(
            (tiny_compressed(recipe).denoiser.full(record.sample, 2, {})[0] - exact).square().mean()
        )
        for recipe in ("w8a8", "w4a8")
    }
    assert 0 < errors["w8a8"] < 0.2 * errors["w4a8"]
    assert errors["w8a8"] < 0.01 * exact.square().mean()


def test_a_stored_pipeline_gives_the_same_images(tiny_compressed: Make) -> None:
    compressed = tiny_compressed("w4a8+deepcache-3")
    again = compress.load(compressed.path)
    assert torch.equal(images(again), images(compressed))
    assert again.compression.recipe == compressed.compression.recipe


def test_another_number_of_steps_is_refused(tiny_compressed: Make) -> None:
    with pytest.raises(ArtifactMismatchError, match="num_inference_steps=7, but 6 were recorded"):
        tiny_compressed("w8a8")(num_inference_steps=7)


def test_trajectories_of_another_model_are_refused(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    other = DDIMPipeline(
        unet=type(tiny_pipeline.unet)(**tiny_pipeline.unet.config), scheduler=tiny_pipeline.scheduler
    )
    with pytest.raises(CalibrationError, match="recorded from another model"):
        compress.apply(other, tiny_calibration, "w8a8", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_trajectories_of_another_scheduler_are_refused(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    other = DDIMPipeline(unet=tiny_pipeline.unet, scheduler=tiny_pipeline.scheduler)
    other.scheduler = DDPMScheduler()
    with pytest.raises(CalibrationError, match="recorded with DDIMScheduler, the pipeline has DDPMScheduler"):
        compress.apply(other, tiny_calibration, "w8a8", tmp_path / "out")


def test_trajectories_of_another_noise_schedule_are_refused(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2")
    other = DDIMPipeline(unet=tiny_pipeline.unet, scheduler=scheduler)
    with pytest.raises(CalibrationError, match="other scheduler settings: beta_schedule differ"):
        compress.apply(other, tiny_calibration, "w8a8", tmp_path / "out")


def test_altered_trajectories_are_refused(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(tiny_calibration.path, tmp_path / "copy"))
    shard = next((copied / "shards").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CalibrationError, match=shard.name):
        compress.apply(tiny_pipeline, calibration.load(copied), "w8a8", tmp_path / "out")
    with pytest.raises(TypeError, match="compress takes a CalibrationSet, got str"):
        compress.apply(tiny_pipeline, str(copied), "w8a8", tmp_path / "out")  # type: ignore[arg-type]


def test_an_existing_directory_is_refused_and_kept(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(RecipeError, match="exists and is not empty"):
        compress.apply(tiny_pipeline, tiny_calibration, "w8a8", tmp_path)
    assert (tmp_path / "mine").read_text() == "kept"


def test_a_failure_before_the_first_finished_stage_leaves_nothing_behind(
    tiny_pipeline: DDIMPipeline,
    tiny_calibration: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("errata.compress.jobs.work.quantize_weights", fail)
    with pytest.raises(KeyboardInterrupt):
        compress.apply(tiny_pipeline, tiny_calibration, "w8a8", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_pipeline_is_compressed_in_float32(
    dtype: torch.dtype, make_plain_unet: Callable[..., UNet2DModel], tmp_path: Path
) -> None:
    unet = make_plain_unet(layers_per_block=1).to(dtype)
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    recording = calibration.collect(
        pipe, tmp_path / "set", num_inference_steps=2, num_samples=2, batch_size=2
    )
    compressed = compress.apply(pipe, recording, "w8a8", tmp_path / "out")
    assert pipe.unet.dtype is dtype
    again = compress.load(tmp_path / "out")
    assert again.float_pipe.unet.dtype is dtype
    assert model_fingerprint(again.float_pipe.unet) == recording.fingerprint
    record = next(recording.batches(1))
    expected = compressed.denoiser.full(record.sample.float(), 1, {})[0]
    assert torch.equal(again.denoiser.full(record.sample.float(), 1, {})[0], expected)
    with torch.no_grad():
        exact = pipe.unet(record.sample, record.timestep).sample.float()
    assert (expected - exact).square().mean() < 0.02 * exact.square().mean()


def test_weights_of_several_types_are_refused(
    tiny_calibration: CalibrationSet, make_plain_unet: Callable[..., UNet2DModel], tmp_path: Path
) -> None:
    unet = make_plain_unet()
    unet.mid_block.half()
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
    with pytest.raises(RecipeError, match="weights are of type float16, float32; allowed is one of float32,"):
        compress.apply(pipe, tiny_calibration, "w8a8", tmp_path / "out")


def test_equalized_parameters_that_stay_are_in_the_table(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tiny_compressed: Make
) -> None:
    """The float network is as it was, so 8 bits err as little as without; only the weights moved."""
    compressed = tiny_compressed("w8a8:equalization=true")
    table = compressed.compression.table
    moved = set(table) & {name for name, _ in tiny_pipeline.unet.named_parameters()}
    assert moved
    assert not {name for name in moved if f"{name.removesuffix('.weight')}.codes" in table}
    record = next(tiny_calibration.batches(2))
    with torch.no_grad():
        exact = tiny_pipeline.unet(record.sample, int(tiny_calibration.timesteps[2])).sample
    error = (compressed.denoiser.full(record.sample, 2, {})[0] - exact).square().mean()
    assert error < 0.01 * exact.square().mean()


def test_numbers_of_samples_are_checked(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="samples_per_step=0; allowed are whole numbers of at least 1"):
        compress.apply(tiny_pipeline, tiny_calibration, "w8a8", tmp_path / "out", samples_per_step=0)


def test_a_latent_pipeline_recomputes_one_resnet(tiny_pipeline: DDIMPipeline) -> None:
    assert branch_of(tiny_pipeline) == 3
    latent = copy.copy(tiny_pipeline)
    latent.vqvae = object()
    assert branch_of(latent) == 1


def test_damaged_directories_are_refused(tiny_compressed: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a compressed pipeline"):
        compress.load(tmp_path)
    (tmp_path / "compressed.json").write_text("{")
    with pytest.raises(RecipeError, match="is not readable"):
        compress.load(tmp_path)
    (tmp_path / "compressed.json").write_text('{"format": "errata-compressed/1"}')
    with pytest.raises(RecipeError, match="has format 'errata-compressed/1'"):
        compress.load(tmp_path)
    original = tiny_compressed("w8a8").path
    (tmp_path / "compressed.json").write_bytes((original / "compressed.json").read_bytes())
    table = load_file(original / "quantizers.safetensors")
    table["conv_in.weight_scale"] *= 2
    save_file(table, tmp_path / "quantizers.safetensors")
    with pytest.raises(RecipeError, match="is missing or was altered"):
        compress.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": Recipe.named("w4a8").to_json()}, "scheme does not fit the recipe w4a8 or the network"),
        ({"schedule": {"num_steps": 6, "full_steps": [0, 3], "branch": 3}}, "schedule does not fit"),
        ({"schedule": {"num_steps": 7, "full_steps": [*range(7)], "branch": 0}}, "timesteps does not fit"),
        (
            {"schedule": {"num_steps": 6, "full_steps": [*range(6)], "branch": 0, "calls_per_step": 2}},
            "calls_per_step does not fit",
        ),
        ({"calibration": {}}, "is not the model that was compressed"),
        ({"calibration": 3}, "cannot be read: TypeError"),
        ({"dtypes": {"unet": "os"}}, "cannot be read: KeyError"),
        ({"sampler": None}, "cannot be read: TypeError"),
    ],
    ids=["recipe", "schedule", "steps", "calls", "origin", "no origin", "types", "sampler"],
)
def test_an_altered_manifest_is_refused(
    change: dict[str, Any], message: str, tiny_compressed: Make, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(tiny_compressed("w8a8").path, tmp_path / "copy"))
    manifest = json.loads((copied / "compressed.json").read_text())
    (copied / "compressed.json").write_text(json.dumps(manifest | change))
    with pytest.raises(RecipeError, match=message):
        compress.load(copied)


@pytest.mark.parametrize("name", ["conv_in.codes", "cache.gain", "up_blocks.1.resnets.0.conv1.output_shift"])
def test_a_table_without_a_tensor_is_refused(name: str, tiny_compressed: Make, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_compressed("w8a8+cachequant-3").path, tmp_path / "copy"))
    file = copied / "quantizers.safetensors"
    save_file({key: value for key, value in load_file(file).items() if key != name}, file)
    manifest = json.loads((copied / "compressed.json").read_text())
    manifest["quantizers_sha256"] = file_digest(file)
    (copied / "compressed.json").write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match=f"does not fit .*KeyError.*{name}.*compress the pipeline again"):
        compress.load(copied)


def test_another_model_in_its_place_is_refused(tiny_compressed: Make, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(tiny_compressed("w8a8").path, tmp_path / "copy"))
    file = next((copied / "pipeline" / "unet").glob("*.safetensors"))
    save_file({name: value * 3 for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="is not the model that was compressed"):
        compress.load(copied)


def test_ranges_do_not_depend_on_training_mode(
    make_plain_unet: Callable[..., UNet2DModel], tmp_path: Path
) -> None:
    unet = make_plain_unet(dropout=0.5, layers_per_block=1)
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    recording = calibration.collect(
        pipe, tmp_path / "set", num_inference_steps=2, num_samples=2, batch_size=2
    )
    tables = []
    for mode in (True, False):
        pipe.unet.train(mode)
        compressed = compress.apply(pipe, recording, "w8a8", tmp_path / f"train-{mode}")
        tables.append(compressed.compression.table)
        assert pipe.unet.training is mode
    assert all(torch.equal(tables[0][name], tables[1][name]) for name in tables[0])


def test_ranges_follow_the_step(tiny_pipeline: DDIMPipeline, tiny_compressed: Make, tmp_path: Path) -> None:
    """Scales that differ strongly between steps: the model must use each step's own."""
    compression = tiny_compressed("w8a8").compression
    scales = compression.table["conv_in.input.0.scale"]
    assert scales.max() / scales.min() > 4
    odd_steps_shifted = scales.clone()
    odd_steps_shifted[1::2] = scales[0::2] * 0.2
    table = {**compression.table, "conv_in.input.0.scale": odd_steps_shifted}
    altered = CompressedPipeline(tiny_pipeline, dataclasses.replace(compression, table=table), tmp_path)
    x = torch.randn(4, 1, 8, 8)
    for step in range(6):
        expected = tiny_compressed("w8a8").denoiser.full(x, step, {})[0]
        found = altered.denoiser.full(x, step, {})[0]
        if step % 2 == 0:
            assert torch.equal(found, expected)
        else:
            assert (found - expected).abs().max() > 1e-3


def test_the_older_name_is_the_same_function() -> None:
    assert compress.apply is compress.compress
