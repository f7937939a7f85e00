"""A diffusers UNet evaluated in full, keeping a feature, or from a kept feature by its shallow branch.

How diffusers' UNets are put together is known here; how their attentions are, in `attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from errata.errors import RecipeError

# Blocks whose resnets and attentions run one after another, each up-block resnet on one skip input.
_BLOCKS = (
    "AttnDownBlock2D", "AttnUpBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D",
    "UpBlock2D",
)  # fmt: skip


class BranchedUNet(nn.Module):
    """Runs a `UNet2DModel` with a cut in its last up block.

    With `branch = b`, the feature is the hidden state that enters the last `b` resnets of the last up block.
    A cached call recomputes only what those resnets need: the time embedding, `conv_in`, the first `b - 1`
    resnets of the first down block (their outputs are the skip inputs), the `b` resnets and the output.

    `full(…, branch=0)` keeps no feature. Without a cache, and with one, `full` equals the wrapped model's own
    forward exactly.

    Source: DeepCache (Ma et al., CVPR 2024), section 3; its CIFAR-10 setting is the last 3 blocks.
    """

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        if not isinstance(unet, UNet2DModel):
            raise RecipeError(f"the denoiser is a {type(unet).__name__}; supported is diffusers' UNet2DModel")
        _refuse_unsupported(unet)
        self.unet = unet

    @property
    def max_branch(self) -> int:
        """How many resnets the last up block has: the largest branch."""
        return len(self.unet.up_blocks[-1].resnets)

    def full(
        self, x: Tensor, timestep: float, cond: Mapping[str, Tensor], *, branch: int
    ) -> tuple[Tensor, Tensor | None]:
        """Prediction `(B, C, H, W)` and, for `branch > 0`, the feature `(B, F, H, W)`."""
        emb = self._embedding(x, timestep, cond)
        hidden = self.unet.conv_in(_centred(self.unet, x))
        skips: tuple[Tensor, ...] = (hidden,)
        for block in self.unet.down_blocks:
            hidden, outputs = block(hidden_states=hidden, temb=emb)
            skips += outputs
        if self.unet.mid_block is not None:
            hidden = self.unet.mid_block(hidden, emb)
        for block in self.unet.up_blocks[:-1]:
            depth = len(block.resnets)
            hidden = block(hidden, skips[-depth:], emb)
            skips = skips[:-depth]
        cut = self.max_branch - branch
        hidden = self._last_block(hidden, skips, emb, first=0, last=cut)
        feature = hidden if branch else None
        hidden = self._last_block(hidden, skips, emb, first=cut, last=self.max_branch)
        return self._output(hidden), feature

    def cached(
        self, x: Tensor, timestep: float, cond: Mapping[str, Tensor], feature: Tensor, *, branch: int
    ) -> Tensor:
        """Prediction `(B, C, H, W)` from the kept feature and the shallow branch."""
        emb = self._embedding(x, timestep, cond)
        hidden = self.unet.conv_in(_centred(self.unet, x))
        skips: tuple[Tensor, ...] = (hidden,)
        block = self.unet.down_blocks[0]
        for index in range(branch - 1):
            hidden = _resnet_and_attention(block, index, hidden, emb)
            skips += (hidden,)
        cut = self.max_branch - branch
        hidden = self._last_block(feature, skips, emb, first=cut, last=self.max_branch)
        return self._output(hidden)

    def _embedding(self, x: Tensor, timestep: float, cond: Mapping[str, Tensor]) -> Tensor:
        unet = self.unet
        time = torch.full((x.shape[0],), timestep, device=x.device, dtype=_time_dtype(timestep))
        emb = unet.time_embedding(unet.time_proj(time).to(dtype=x.dtype))
        labels = cond.get("class_labels")
        if (labels is None) != (unet.class_embedding is None):
            expected = "no class_labels" if unet.class_embedding is None else "class_labels"
            raise ValueError(f"this UNet takes {expected}; got conditioning {sorted(cond)}")
        if labels is not None:
            if unet.config.class_embed_type == "timestep":
                labels = unet.time_proj(labels)
            emb = emb + unet.class_embedding(labels).to(dtype=x.dtype)
        return emb

    def _last_block(
        self, hidden: Tensor, skips: tuple[Tensor, ...], emb: Tensor, *, first: int, last: int
    ) -> Tensor:
        block = self.unet.up_blocks[-1]
        for index in range(first, last):
            hidden = torch.cat([hidden, skips[self.max_branch - 1 - index]], dim=1)
            hidden = _resnet_and_attention(block, index, hidden, emb)
        return hidden

    def _output(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(hidden)))
        return output


def skip_widths(unet: UNet2DModel) -> dict[str, int]:
    """Width of the main half of every concatenated input, by layer name.

    The first convolution (and the 1x1 shortcut) of every up-block resnet reads `[hidden, skip]` concatenated
    over channels; the value is the number of channels of `hidden`.
    """
    widths: dict[str, int] = {}
    hidden = int(unet.config.block_out_channels[-1])
    for block_index, block in enumerate(unet.up_blocks):
        for index, resnet in enumerate(block.resnets):
            prefix = f"up_blocks.{block_index}.resnets.{index}"
            for name in ("conv1", "conv_shortcut"):
                if getattr(resnet, name, None) is not None:
                    widths[f"{prefix}.{name}"] = hidden
            hidden = resnet.out_channels
    return widths


def float_layer(unet: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """The convolution or linear layer of that name.

    Raises:
        AttributeError: there is none.
    """
    module = unet.get_submodule(name)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise AttributeError(f"{name!r} is a {type(module).__name__}, not a convolution or linear layer")
    return module


def replace_module(unet: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the layer of that name, in `unet` itself."""
    parent_name, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent_name), child, module)


def is_time_embedding(name: str) -> bool:
    """Whether the layer belongs to the time embedding (8-bit weights, float activations)."""
    return name.startswith("time_embedding.") or name.endswith(".time_emb_proj")


def _resnet_and_attention(block: Any, index: int, hidden: Tensor, emb: Tensor) -> Tensor:
    hidden = block.resnets[index](hidden, emb)
    attentions = getattr(block, "attentions", None)
    return attentions[index](hidden) if attentions is not None else hidden


def _centred(unet: UNet2DModel, x: Tensor) -> Tensor:
    return 2 * x - 1.0 if unet.config.center_input_sample else x


def _time_dtype(timestep: float) -> torch.dtype:
    return torch.long if float(timestep).is_integer() else torch.float32


def _refuse_unsupported(unet: UNet2DModel) -> None:
    for name, block in [*_named(unet.down_blocks, "down"), *_named(unet.up_blocks, "up")]:
        if type(block).__name__ not in _BLOCKS:
            raise RecipeError(f"{name} is a {type(block).__name__}; supported are {', '.join(_BLOCKS)}")
    if getattr(unet.up_blocks[-1], "upsamplers", None) is not None:
        raise RecipeError("the last up block has an upsampler; a UNet2DModel without one is expected")
    if unet.config.time_embedding_type == "fourier":
        raise RecipeError("time_embedding_type='fourier' is not supported; use a 'positional' UNet2DModel")


def _named(blocks: nn.ModuleList, kind: str) -> list[tuple[str, nn.Module]]:
    return [(f"{kind}_blocks.{index}", block) for index, block in enumerate(blocks)]
