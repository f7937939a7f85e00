"""The pipeline that most tests compress and export, and what makes its artifacts."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from plain_outputs import plain_outputs

from errata import compress, deploy
from errata.calibration import CalibrationSet
from errata.compress import CompressedPipeline, Recipe


def tiny_ddim(*, layers_per_block: int) -> DDIMPipeline:
    """An 8x8, one-channel DDIM pipeline with random weights that predicts noise of about unit size.

    At its initial size a random network predicts next to nothing, and every identity about it would
    hold to any tolerance.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(16, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=layers_per_block,
            attention_head_dim=8,
            norm_num_groups=4,
        ).eval()
        noise = torch.randn(64, 1, 8, 8)
    with torch.no_grad():
        size = unet(noise, 500).sample.square().mean().sqrt()
        unet.conv_out.weight /= size
        unet.conv_out.bias /= size
    pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compressed_by_name(
    pipeline: DDIMPipeline, recorded: CalibrationSet, root: Path
) -> Callable[[str], CompressedPipeline]:
    """Compress the pipeline by the recipe of a name, each once, in `root`.

    Recipes that differ in their cache alone share codes and ranges. No map of the output helps this network.
    """

    @functools.cache
    def make(name: str) -> CompressedPipeline:
        recipe = Recipe.named(name)
        plain = Recipe(quantization=recipe.quantization).name if recipe.quantization is not None else name
        reuse = make(plain) if plain != name else None
        with plain_outputs():
            return compress.apply(pipeline, recorded, recipe, root / name.replace(":", "_"), reuse=reuse)

    return make


def exported_by_name(compressed: Callable[[str], CompressedPipeline], root: Path) -> Callable[[str], Path]:
    """Export what `compressed` makes of a name, each once, in `root`."""

    @functools.cache
    def make(name: str) -> Path:
        return deploy.export(compressed(name), root / name.replace(":", "_"))

    return make
