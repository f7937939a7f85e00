"""The stages of `real_size.py --model sdxl`: a whole SDXL pipeline in float16, random weights.

Every network has its real shape: UNet 2.57 billion parameters, text encoders 123 and 695 million,
autoencoder 84 million; 128x128 latents, 4096 tokens, 77 of 2048 channels. The pipeline is opened in the way
that `errata` opens any, recorded for `--steps` steps of one guided sample, compressed with `w8a8`, deployed,
and makes one image of as many steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn

from errata import calibration, deploy

PROMPT = "a photo of a horse"
UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_2 = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def make_pipeline(options: argparse.Namespace) -> str:
    """Save the pipeline in float16."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    texts = [CLIPTextConfig(**size, **special) for size in (TEXT, TEXT_2)]
    pipe = StableDiffusionXLPipeline(
        unet=in_half(lambda: UNet2DConditionModel(**UNET)),
        vae=in_half(lambda: AutoencoderKL(**VAE)),
        text_encoder=CLIPTextModel(texts[0]).half(),
        text_encoder_2=CLIPTextModelWithProjection(texts[1]).half(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
    )
    pipe.save_pretrained(options.work / "pipeline")
    return f"UNet of {sum(value.numel() for value in pipe.unet.parameters()) / 1e9:.2f} billion parameters"


def tokenizer() -> Any:
    """Return a tokenizer of a few words: what they are does not matter here."""
    from transformers import CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in PROMPT.split())]
    words += ["a", "b", "b</w>", "ab</w>"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(vocab=vocabulary, merges=[("a", "b</w>")], model_max_length=77)


@torch.no_grad()
def in_half(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a network in float16 with the usual random weights, never held in float32."""
    with torch.device("meta"):
        model = make()
    model = model.half().to_empty(device="cpu")
    for module in model.modules():
        if isinstance(reset := getattr(module, "reset_parameters", None), Callable):
            reset()
    return model.eval()


def record(options: argparse.Namespace) -> str:
    """Record one guided trajectory."""
    pipe = calibration.load_pipeline(options.work / "pipeline")
    start = time.perf_counter()
    calibration.calibrate(
        pipe, options.work / "calibration", num_inference_steps=options.steps, num_samples=1, batch_size=1,
        prompts=[PROMPT], guidance_scale=5.0,
    )  # fmt: skip
    return f"{(time.perf_counter() - start) / options.steps:.1f} s a step of one guided sample"


def generate(options: argparse.Namespace) -> str:
    """Make one image."""
    deployed = deploy.load(options.work / "artifact")
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    image = deployed(PROMPT, guidance_scale=5.0, generator=generator).images[0]
    image.save(Path(options.work) / "image.png")
    return f"one image of {options.steps} steps alone {time.perf_counter() - start:.0f} s, {image.size}"
