"""A small pipeline of every served class: random weights, real blocks, tokenizers made on the spot."""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)

from errata import calibration, compress, deploy
from errata.compress import CompressedPipeline
from errata.deploy import DeployedPipeline
from errata.pipelines import ClassConditionalLDMPipeline, ClassEmbedder


def _sibling(name: str) -> Any:
    """A module of this folder; under `--import-mode=importlib` no import statement finds it."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parts = _sibling("parts")
TWO_SAMPLES = {"prompt": ["a b", "c"], "negative_prompt": ["b", "ab"]}


@dataclass(frozen=True)
class Small:
    """A pipeline, the arguments that draw two samples with it, and the name of what it draws."""

    pipe: Any
    inputs: dict[str, Any]
    output: str = "images"

    def draw(self, run: Callable[..., Any], first_seed: int) -> torch.Tensor:
        """Two samples of `run`, one seed each."""
        seeds = [torch.Generator().manual_seed(first_seed + index) for index in range(2)]
        drawn = getattr(run(generator=seeds, output_type="np", **self.inputs), self.output)
        return torch.as_tensor(drawn).float()

    def collect(self, out: Path, *, steps: int, batches: int = 1) -> calibration.CalibrationSet:
        """Batches of two samples, recorded with the very arguments that are drawn with."""
        inputs = {
            name: value for name, value in self.inputs.items() if name not in ("batch_size", "guidance_scale")
        }
        return calibration.collect(
            self.pipe,
            out,
            num_inference_steps=steps,
            num_samples=2 * batches,
            batch_size=2,
            inputs=[inputs] * batches,
            guidance_scale=self.inputs.get("guidance_scale"),
        )


def ddim() -> Small:
    return Small(
        DDIMPipeline(unet=parts.plain_unet(in_channels=3), scheduler=parts.plain_ddim()), {"batch_size": 2}
    )


def ldm_labels_vq(*, splits_guidance: bool = False) -> Small:
    unet = parts.plain_unet(num_class_embeds=parts.NUM_CLASSES + 1)
    pipe = ClassConditionalLDMPipeline(
        parts.vq(),
        unet,
        parts.plain_ddim(),
        unconditional_label=parts.NUM_CLASSES,
        splits_guidance=splits_guidance,
    )
    return Small(pipe, {"class_labels": [3, 7], "guidance_scale": 2.0})


def ldm_context_kl() -> Small:
    """As the ImageNet model: the label is a one-token context; DPM-Solver++ 2M."""
    pipe = ClassConditionalLDMPipeline(
        parts.kl(),
        parts.text_unet(),
        DPMSolverMultistepScheduler(**parts.BETAS),
        class_embedder=ClassEmbedder(parts.NUM_CLASSES, parts.TEXT_WIDTH).eval(),
    )
    return Small(pipe, {"class_labels": [0, 9], "guidance_scale": 2.0})


def ldm_unconditional() -> Small:
    """As the LSUN models, with stochastic DDIM."""
    return Small(
        ClassConditionalLDMPipeline(parts.vq(), parts.plain_unet(), parts.plain_ddim()),
        {"eta": 0.5, "batch_size": 2},
    )


def stable_diffusion_1() -> Small:
    """Noise prediction, convolutional projections, PLMS with its repeated timestep."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=parts.kl(),
        text_encoder=parts.clip_text_model(),
        tokenizer=parts.clip_tokenizer(),
        unet=parts.text_unet(),
        scheduler=PNDMScheduler(**parts.BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Small(pipe, {**TWO_SAMPLES, "guidance_scale": 3.0})


def stable_diffusion_2() -> Small:
    """v-prediction, linear projections, DDIM."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=parts.kl(),
        text_encoder=parts.clip_text_model(hidden_act="gelu"),
        tokenizer=parts.clip_tokenizer(),
        unet=parts.text_unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        scheduler=parts.plain_ddim(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Small(pipe, {**TWO_SAMPLES, "guidance_scale": 3.0})


def stable_diffusion_xl() -> Small:
    from diffusers import StableDiffusionXLPipeline

    unet = parts.text_unet(
        use_linear_projection=True,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * parts.TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + parts.TEXT_WIDTH,
    )
    pipe = StableDiffusionXLPipeline(
        vae=parts.kl(),
        text_encoder=parts.clip_text_model(),
        text_encoder_2=parts.clip_text_model(with_projection=True),
        tokenizer=parts.clip_tokenizer(),
        tokenizer_2=parts.clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**parts.BETAS, timestep_spacing="leading", steps_offset=1),
    )
    return Small(pipe, {**TWO_SAMPLES, "guidance_scale": 3.0})


def stable_diffusion_upscale() -> Small:
    """The noise level as a class label; a second scheduler; v-prediction."""
    from diffusers import StableDiffusionUpscalePipeline

    unet = parts.text_unet(
        in_channels=7, num_class_embeds=350, use_linear_projection=True, only_cross_attention=(True, False)
    )
    pipe = StableDiffusionUpscalePipeline(
        vae=parts.kl(scaling_factor=0.08333),
        text_encoder=parts.clip_text_model(),
        tokenizer=parts.clip_tokenizer(),
        unet=unet,
        low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=parts.plain_ddim(prediction_type="v_prediction"),
        max_noise_level=350,
    )
    return Small(pipe, {**TWO_SAMPLES, "guidance_scale": 3.0, "image": parts.pictures(16), "noise_level": 20})


def stable_diffusion_latent_upscale() -> Small:
    """The K-blocks, with a Fourier time embedding and a fifth output channel; sample prediction, Euler."""
    from diffusers import StableDiffusionLatentUpscalePipeline

    unet = UNet2DConditionModel(
        sample_size=16,
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        time_cond_proj_dim=128
        + parts.TEXT_WIDTH,  # the pipeline's embedding of the noise level, and the text's
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=parts.TEXT_WIDTH,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 2),
        up_block_types=(*["KCrossAttnUpBlock2D"] * 2, "KUpBlock2D"),
        in_channels=8,
        out_channels=5,
        mid_block_type=None,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    ).eval()
    context = torch.randn(2, 8, parts.TEXT_WIDTH)
    parts.of_unit_size(
        unet, unet(torch.randn(2, 8, 16, 16), 0.5, context, timestep_cond=torch.randn(2, 144)).sample
    )
    pipe = StableDiffusionLatentUpscalePipeline(
        vae=parts.kl(),
        text_encoder=parts.clip_text_model(),
        tokenizer=parts.clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**parts.BETAS, prediction_type="sample"),
    )
    return Small(pipe, {**TWO_SAMPLES, "guidance_scale": 2.0, "image": parts.pictures(16)})


def stable_diffusion_inpaint() -> Small:
    """Nine input channels: noise, mask, and what the mask leaves of the image."""
    from diffusers import StableDiffusionInpaintPipeline

    pipe = StableDiffusionInpaintPipeline(
        vae=parts.kl(),
        text_encoder=parts.clip_text_model(),
        tokenizer=parts.clip_tokenizer(),
        unet=parts.text_unet(in_channels=9),
        scheduler=parts.plain_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    image, mask = parts.pictures(16), parts.pictures(16)[:, :1].round()
    return Small(pipe, {**TWO_SAMPLES, "guidance_scale": 3.0, "image": image, "mask_image": mask})


def audio_ldm_2() -> Small:
    """Two contexts in turn, of different widths; the text goes through CLAP, T5 and GPT-2."""
    from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel

    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=(
            "UpBlock2D",
            "UpBlock2D",
        ),  # with attention there, twice as many layers of the same kinds
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=((None, parts.TEXT_WIDTH, 32),) * 2,
    ).eval()
    contexts = {
        "encoder_hidden_states": torch.randn(2, 8, parts.TEXT_WIDTH),
        "encoder_hidden_states_1": torch.randn(2, 8, 32),
    }
    parts.of_unit_size(unet, unet(torch.randn(2, 4, 8, 8), 500, **contexts).sample)
    pipe = AudioLDM2Pipeline(
        vae=parts.kl(in_channels=1, out_channels=1),
        text_encoder=parts.clap(),
        text_encoder_2=parts.t5(),
        projection_model=AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=16
        ).eval(),
        language_model=parts.gpt2(),
        tokenizer=parts.roberta_tokenizer(),
        tokenizer_2=parts.t5_tokenizer(),
        feature_extractor=parts.clap_feature_extractor(),
        unet=unet,
        scheduler=parts.plain_ddim(),
        vocoder=parts.hifi_gan(),
    )
    return Small(
        pipe,
        {**TWO_SAMPLES, "guidance_scale": 3.0, "audio_length_in_s": 0.016, "max_new_tokens": 4},
        "audios",
    )


BUILDERS: dict[str, Callable[[], Small]] = {
    "ddim": ddim,
    "ldm labels vq": ldm_labels_vq,
    "ldm labels split": functools.partial(ldm_labels_vq, splits_guidance=True),
    "ldm context kl": ldm_context_kl,
    "ldm unconditional": ldm_unconditional,
    "sd 1": stable_diffusion_1,
    "sd 2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "sd upscale": stable_diffusion_upscale,
    "sd latent upscale": stable_diffusion_latent_upscale,
    "audioldm2": audio_ldm_2,
}
# Left out of the tests that try every pipeline.
ONLY_FROM_FOLDERS: dict[str, Callable[[], Small]] = {"sd inpaint": stable_diffusion_inpaint}
NEED_NO_TEXT = ("ddim", "ldm labels vq", "ldm labels split", "ldm context kl", "ldm unconditional")


@pytest.fixture(scope="session")
def small_pipeline() -> Callable[[str], Small]:
    """`small_pipeline("sdxl")`: that pipeline, always with the same weights; once a session."""

    @functools.cache
    def build(name: str) -> Small:
        if name not in NEED_NO_TEXT:
            pytest.importorskip("transformers")
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(5)
            small = (BUILDERS | ONLY_FROM_FOLDERS)[name]()
        small.pipe.set_progress_bar_config(disable=True)
        return small

    return build


@pytest.fixture(scope="session")
def small_compressed(
    small_pipeline: Callable[[str], Small], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], CompressedPipeline]:
    """`small_compressed("sdxl")`: that pipeline in W8A8, with four steps; once a session."""

    @functools.cache
    def make(name: str) -> CompressedPipeline:
        small, root = small_pipeline(name), tmp_path_factory.mktemp("w8a8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("errata.compress.quantize.step_sketch.VALUES_PER_STEP", 2048)
            recorded = small.collect(root / "set", steps=4, batches=2)
            return compress.apply(small.pipe, recorded, "w8a8", root / "compressed")

    return make


@pytest.fixture(scope="session")
def small_artifact(
    small_pipeline: Callable[[str], Small], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], DeployedPipeline]:
    """`small_artifact("sdxl")`: that pipeline with a cache, six steps of which two are full; once a session.

    The network keeps its float weights, so what a correction makes of it can be computed without an artifact.
    The latent upscaler, which no cache can serve, is W8A8, with three steps.
    """

    @functools.cache
    def make(name: str) -> DeployedPipeline:
        small, root = small_pipeline(name), tmp_path_factory.mktemp("small")
        is_cached = name != "sd latent upscale"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("errata.compress.quantize.step_sketch.VALUES_PER_STEP", 2048)
            recorded = small.collect(root / "set", steps=6 if is_cached else 3)
            recipe = "deepcache-3" if is_cached else "w8a8"
            compressed = compress.apply(small.pipe, recorded, recipe, root / "compressed")
        deployed = deploy.load(deploy.export(compressed, root / "artifact"))
        deployed.pipe.set_progress_bar_config(disable=True)
        return deployed

    return make
