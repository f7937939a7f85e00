"""A loaded network is rewritten for the CPU: blocks around int8 layers, in place of diffusers' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from errata.deploy.cpu import native
from errata.deploy.cpu.embedding import OneTimeEmbedding
from errata.deploy.cpu.output import FusedOutput
from errata.deploy.cpu.resnet import FusedDownsample, FusedResnet, FusedUpsample
from errata.runtime.layers import replace_module
from errata.runtime.step_context import StepContext


def fuse(unet: nn.Module, context: StepContext) -> dict[str, str]:
    """Replaces in `unet` itself whatever can be fused; names of layers stay.

    Float convolutions that are left get channels_last weights, so that everything is in one memory format.

    Returns:
        For the layers around which something was fused: what, in a few words.
    """
    keeps_biases = embeds_time_only(unet)
    in_one_pass = "normalized, activated and quantized " + (
        f"by tensor operations: {native.obstacle()}" if native.obstacle() else "in one native pass"
    )
    told: dict[str, str] = {}
    for name, module in list(unet.named_modules()):
        if FusedResnet.is_fusible(module):
            replace_module(unet, name, FusedResnet(module, context, keeps_biases=keeps_biases))
            told |= dict.fromkeys((f"{name}.conv1", f"{name}.conv2"), f"input {in_one_pass}")
        elif FusedUpsample.is_fusible(module):
            replace_module(unet, name, FusedUpsample(module))
            told[f"{name}.conv"] = "upsampled as codes"
        elif FusedDownsample.is_fusible(module):
            replace_module(unet, name, FusedDownsample(module))
            told[f"{name}.conv"] = "padded as codes"
    if keeps_biases and OneTimeEmbedding.is_fusible(unet.time_embedding):  # type: ignore[arg-type]
        unet.time_embedding = OneTimeEmbedding(unet.time_embedding, context)
    if FusedOutput.is_fusible(unet):
        FusedOutput.into(unet)
        told["conv_out"] = f"input {in_one_pass}"
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return told


def embeds_time_only(unet: Any) -> bool:
    """Whether the embedding that ResNet blocks get follows from the time of the step alone."""
    conditions = ("class_embedding", "add_embedding", "aug_emb")
    is_plain = all(getattr(unet, name, None) is None for name in conditions)
    return is_plain and getattr(unet.time_embedding, "cond_proj", None) is None
