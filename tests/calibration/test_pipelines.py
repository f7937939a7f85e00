"""A pipeline is opened in float32 from safetensors, or refused in one line that says why."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline

from errata import CalibrationError, calibration


@pytest.fixture
def copied(saved_pipeline: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(saved_pipeline, tmp_path / "tiny"))


def test_a_directory_opens_as_it_was_saved(saved_pipeline: Path, tiny_pipeline: DDIMPipeline) -> None:
    for source in (saved_pipeline, str(saved_pipeline)):
        pipe = calibration.load_pipeline(source)
        assert type(pipe) is DDIMPipeline
        assert calibration.model_fingerprint(pipe.unet) == calibration.model_fingerprint(tiny_pipeline.unet)


def test_half_precision_files_become_float32(saved_pipeline: Path, tmp_path: Path) -> None:
    half = DiffusionPipeline.from_pretrained(saved_pipeline, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    files = list((tmp_path / "half" / "unet").glob("*.safetensors"))
    whole_files = list((saved_pipeline / "unet").glob("*.safetensors"))
    assert files[0].stat().st_size < 0.6 * whole_files[0].stat().st_size
    pipe = calibration.load_pipeline(tmp_path / "half")
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}
    assert torch.equal(pipe.unet.conv_in.weight, half.unet.conv_in.weight.float())


def _rewrite_index(path: Path, **changes: Any) -> None:
    index = json.loads((path / "model_index.json").read_text()) | changes
    kept = {name: value for name, value in index.items() if value != "gone"}
    (path / "model_index.json").write_text(json.dumps(kept))


def test_what_is_no_pipeline_is_refused(copied: Path, tmp_path: Path) -> None:
    def refused(source: str | Path, message: str) -> None:
        with pytest.raises(CalibrationError, match=message) as caught:
            calibration.load_pipeline(source)
        assert "\n" not in str(caught.value)

    refused(
        tmp_path / "nowhere",
        r"nowhere` does not exist; give a diffusers directory \(one with model_index",
    )
    refused("./nowhere", "`./nowhere` does not exist")
    refused("a b", "`a b` does not exist")
    refused(copied / "model_index.json", "is not a directory; give a diffusers directory")
    refused(copied / "unet", "is not a pipeline: it has no model_index.json; give a diffusers directory")
    _rewrite_index(copied, unet="gone")
    refused(copied, "has no unet in its model_index.json")
    _rewrite_index(copied, unet=[None, None])
    refused(copied, "has no unet in its model_index.json")
    _rewrite_index(copied, _class_name=["pipeline", "Evil"])
    refused(copied, "does not name a pipeline class")
    (copied / "model_index.json").write_text("{")
    refused(copied, "model_index.json` is not valid JSON")


def test_damaged_weights_are_refused(copied: Path) -> None:
    (weights,) = (copied / "unet").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="`.*tiny` cannot be opened as a pipeline: ") as caught:
        calibration.load_pipeline(copied)
    assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(CalibrationError, match="unet` has no safetensors weights; copy the pipel") as caught:
        calibration.load_pipeline(copied)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(
        CalibrationError, match=r"unet` has its weights only as a pickle \(`diffusion_pytorch_model.bin`"
    ):
        calibration.load_pipeline(tmp_path / "pickled")


@pytest.mark.parametrize("problem", ["cannot connect\nand much more", ""])
def test_an_unreachable_hub_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    def fail(*_: object, **options: Any) -> None:
        assert options["use_safetensors"] is True
        raise OSError(problem)

    monkeypatch.setattr(DiffusionPipeline, "download", fail)
    with pytest.raises(
        CalibrationError, match="`google/ddpm` is no local directory, and cannot be fetched"
    ) as caught:
        calibration.load_pipeline("google/ddpm")
    assert str(caught.value).endswith(
        f"{'cannot connect' if problem else 'OSError'}; check the name and the connection"
    )


def test_a_hub_pipeline_without_unet_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: object())
    with pytest.raises(CalibrationError, match="`some/dit` is a object, which has no unet"):
        calibration.load_pipeline("some/dit")


def test_stable_diffusion_is_recorded_and_replayed(tmp_path: Path) -> None:
    """The real thing, tiny and with random weights: text encoder, guidance, latents."""
    pipe = _tiny_stable_diffusion()
    pipe.save_pretrained(tmp_path / "sd")
    pipe = calibration.load_pipeline(tmp_path / "sd")
    pipe.set_progress_bar_config(disable=True)
    decoded: list[int] = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda *_: decoded.append(1))
    recorded = calibration.collect(
        pipe, tmp_path / "set", num_inference_steps=3, num_samples=3, batch_size=2, prompts=["a", "b", "ab"]
    )
    handle.remove()
    assert decoded == []
    assert recorded.rows_per_sample == 2  # its default guidance scale is 7.5
    assert recorded.cond_names == ("encoder_hidden_states",)
    pipe.scheduler.set_timesteps(3)
    for step in range(2):
        for now, then in zip(recorded.batches(step), recorded.batches(step + 1), strict=True):
            with torch.no_grad():
                eps = pipe.unet(now.sample, now.timestep, **calibration.nest(now.cond)).sample
            plain, guided = eps.chunk(2)
            x = now.sample.chunk(2)[0]
            x = pipe.scheduler.step(plain + 7.5 * (guided - plain), now.timestep, x).prev_sample
            assert torch.equal(torch.cat([x, x]), then.sample)


def _tiny_stable_diffusion() -> Any:
    transformers = pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b", "ab</w>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=[("a", "b</w>")], model_max_length=8
    )
    text_config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, **_two_vae_blocks()
        ),
        text_encoder=transformers.CLIPTextModel(text_config).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 8),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=8,
            norm_num_groups=4,
        ).eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _two_vae_blocks() -> dict[str, tuple[str, str]]:
    return {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    }


def test_a_pipeline_with_a_foreign_component_class_is_refused(copied: Path) -> None:
    _rewrite_index(copied, unet=["my_code", "MyUNet"])
    with pytest.raises(CalibrationError, match="cannot be opened as a pipeline: "):
        calibration.load_pipeline(copied)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_recorded_as_it_is(
    dtype: torch.dtype, tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    unet = copy.deepcopy(tiny_pipeline.unet).to(dtype)
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    recorded = calibration.collect(pipe, tmp_path / "set", num_inference_steps=2, num_samples=3, batch_size=2)
    assert [record.sample.dtype for record in recorded.batches(1)] == [dtype, dtype]
    again = calibration.load(tmp_path / "set")
    for now, then in zip(recorded.batches(1), again.batches(1), strict=True):
        assert torch.equal(now.sample, then.sample)


def test_layers_beside_a_weight_are_refused(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    """What peft does to a layer, done by hand: it need not be installed."""

    class Adapted(torch.nn.Module):
        def __init__(self, base_layer: torch.nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

    unet = copy.deepcopy(tiny_pipeline.unet)
    unet.mid_block.resnets[0].conv1 = Adapted(unet.mid_block.resnets[0].conv1)
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    with pytest.raises(
        CalibrationError,
        match=r"`unet.mid_block.resnets.0.conv1` has LoRA layers next to its weight; fuse them first: `pi",
    ):
        calibration.collect(pipe, tmp_path / "set", num_inference_steps=2, num_samples=1, batch_size=1)
    assert list(tmp_path.iterdir()) == []
