"""Networks with real blocks and random weights, tokenizers with a handful of words.

Random networks say next to nothing at their initial size, so the last layer of each is scaled.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel

WORDS = ("<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "c</w>", "a", "b", "c", "ab</w>")
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TEXT_WIDTH = 16
NUM_CLASSES = 10


def plain_ddim(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **changes)


def plain_unet(**changes: Any) -> UNet2DModel:
    settings: dict[str, Any] = {
        "in_channels": 4,
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        **changes,
    }
    unet = UNet2DModel(
        sample_size=8,
        out_channels=settings["in_channels"],
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        **settings,
    ).eval()
    labels = torch.tensor([1, 2]) if "num_class_embeds" in settings else None
    of_unit_size(unet, unet(torch.randn(2, settings["in_channels"], 8, 8), 500, labels).sample)
    return unet


def text_unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "in_channels": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": TEXT_WIDTH,
        "norm_num_groups": 8,
    } | changes
    unet = UNet2DConditionModel(sample_size=8, out_channels=4, **settings).eval()
    x, context = (
        torch.randn(2, settings["in_channels"], 8, 8),
        torch.randn(2, 8, settings["cross_attention_dim"]),
    )
    added = {"text_embeds": torch.randn(2, TEXT_WIDTH), "time_ids": torch.full((2, 6), 8.0)}
    options = {"class_labels": torch.tensor([1, 2])} if "num_class_embeds" in settings else {}
    of_unit_size(unet, unet(x, 500, context, added_cond_kwargs=added, **options).sample)
    return unet


def of_unit_size(model: Any, output: torch.Tensor, size: float = 1.0) -> None:
    """Scales the last layer: at its initial size a random network says nothing, and all comparisons hold."""
    model.conv_out.weight *= size / output.std()
    if model.conv_out.bias is not None:
        model.conv_out.bias.zero_()


def kl(**changes: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        **changes,
    ).eval()
    channels = vae.config.in_channels
    of_unit_size(vae.decoder, vae.decode(torch.randn(2, 4, 8, 8)).sample, size=0.4)
    of_unit_size(vae.encoder, vae.encode(2 * pictures(16)[:, :channels] - 1).latent_dist.mean)
    return vae


def vq() -> VQModel:
    vae = VQModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        latent_channels=4,
        num_vq_embeddings=512,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        scaling_factor=6.0,
    ).eval()
    vae.quantize.embedding.weight.normal_()
    of_unit_size(vae.decoder, vae.decode(torch.randn(2, 4, 8, 8)).sample, size=0.4)
    return vae


def pictures(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(8))


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_numbered(WORDS), merges=[("a", "b</w>")], model_max_length=8)


def clip_text_model(*, with_projection: bool = False, hidden_act: str = "quick_gelu") -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        hidden_act=hidden_act,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def clap() -> Any:
    from transformers import ClapConfig, ClapModel

    text = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16, "max_position_embeddings": 90}
    audio = {
        "hidden_size": 192,
        "intermediate_size": 32,
        "projection_dim": 16,
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "patch_size": 2,
        "patch_stride": 2,
        "patch_embed_input_channels": 4,
    }
    text |= {"vocab_size": 100, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=16)).eval()


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=32, d_ff=32, d_kv=8, num_heads=2, num_layers=1)
    ).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 99}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).eval()


def roberta_tokenizer() -> Any:
    from transformers import RobertaTokenizer

    words = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "c", "Ġ", "Ġa", "Ġb", "Ġc")
    merges = [("Ġ", "a"), ("Ġ", "b"), ("Ġ", "c")]
    return RobertaTokenizer(vocab=_numbered(words), merges=merges, model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    words = ("<pad>", "</s>", "<unk>", "▁", "a", "b", "c", "▁a", "▁b")
    scores = [(word, -float(index)) for index, word in enumerate(words)]
    return T5Tokenizer(vocab=scores, extra_ids=0, model_max_length=16)


def clap_feature_extractor() -> Any:
    from transformers import ClapFeatureExtractor

    return ClapFeatureExtractor(feature_size=8, hop_length=7900)


def hifi_gan() -> Any:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    config = SpeechT5HifiGanConfig(
        model_in_dim=16,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    vocoder = SpeechT5HifiGan(config).eval()
    vocoder.conv_post.weight *= 0.2 / vocoder(torch.randn(2, 64, 16)).std()
    vocoder.conv_post.bias.zero_()
    return vocoder


def _numbered(words: tuple[str, ...]) -> dict[str, int]:
    return {word: index for index, word in enumerate(words)}
