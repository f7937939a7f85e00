"""The outline of diffusers' `UNet2DModel`, from its configuration alone.

Only what is common is known here: convolutions with group norms, plain and attention blocks. Of any other
configuration there is no outline, and whoever asked makes the network itself.

Source: diffusers 0.42, `models/unets/unet_2d.py` and `unet_2d_blocks.py`; tests compare with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from errata.runtime.outline import Attention, Conv2d, GroupNorm, Linear, ModuleList, Outline

# What has an outline only at its default.
_FIXED: Mapping[str, Any] = {
    "act_fn": "silu",
    "add_attention": True,
    "attn_norm_num_groups": None,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_type": "UNetMidBlock2D",
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
_WHOLE = ("in_channels", "layers_per_block", "norm_num_groups", "out_channels")
_SWITCHES = ("center_input_sample", "flip_sin_to_cos")
_NUMBERS = ("downsample_padding", "dropout", "freq_shift", "mid_block_scale_factor", "norm_eps")
_OPTIONAL = ("attention_head_dim", "sample_size", "time_embedding_dim")
_BLOCKS = ("block_out_channels", "down_block_types", "up_block_types")
_KEYS = {*_FIXED, *_WHOLE, *_SWITCHES, *_NUMBERS, *_OPTIONAL, *_BLOCKS}
_IGNORED = {"_class_name", "_diffusers_version"}
_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D")
_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D")
_MOST_LAYERS, _MOST_BLOCKS, _LARGEST_PADDING, _LARGEST_WIDTH = 16, 16, 64, 2**16


class UNet2DModel(Outline):
    """The whole network; `config` has the settings that a scheme asks for."""

    config: SimpleNamespace


class DownBlock2D(Outline):
    """Resnets, then a downsampler."""


class AttnDownBlock2D(Outline):
    """Resnets, each with an attention, then a downsampler."""


class UpBlock2D(Outline):
    """Resnets, then an upsampler."""


class AttnUpBlock2D(Outline):
    """Resnets, each with an attention, then an upsampler."""


class Resnet(Outline):
    """Two convolutions, a projection of the time, and a shortcut where the width changes."""

    def __init__(self, entering: int, width: int, embedded: int) -> None:
        super().__init__(
            norm1=GroupNorm(entering),
            conv1=Conv2d(entering, width),
            time_emb_proj=Linear(embedded, width),
            norm2=GroupNorm(width),
            dropout=Outline(),
            conv2=Conv2d(width, width),
            nonlinearity=Outline(),
            conv_shortcut=None if entering == width else Conv2d(entering, width, 1),
        )
        self.in_channels, self.out_channels = entering, width


# By name: the class, and whether there is an attention after each resnet.
_BLOCK_KINDS: Mapping[str, tuple[type[Outline], bool]] = {
    "DownBlock2D": (DownBlock2D, False),
    "AttnDownBlock2D": (AttnDownBlock2D, True),
    "UpBlock2D": (UpBlock2D, False),
    "AttnUpBlock2D": (AttnUpBlock2D, True),
}


def unet_outline(config: Mapping[str, Any]) -> UNet2DModel | None:
    """Return the outline of the network that diffusers makes of a configuration; None where it is not known.

    `config` is the content of `config.json`; every setting is in it, as `save_pretrained` writes it.
    """
    if config.get("_class_name") != "UNet2DModel" or not _is_known(config):
        return None
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    embedded = config["time_embedding_dim"] or 4 * widths[0]
    head = config["attention_head_dim"]
    if any(width % config["norm_num_groups"] or (head and width % head) for width in widths):
        return None
    network = UNet2DModel(
        conv_in=Conv2d(config["in_channels"], widths[0]),
        time_proj=Outline(),
        time_embedding=Outline(
            linear_1=Linear(widths[0], embedded), act=Outline(), linear_2=Linear(embedded, embedded)
        ),
        down_blocks=_down_blocks(config["down_block_types"], widths, layers, embedded),
        up_blocks=_up_blocks(config["up_block_types"], widths, layers + 1, embedded),
        mid_block=Outline(
            attentions=ModuleList(Attention(widths[-1])),
            resnets=ModuleList(*(Resnet(widths[-1], widths[-1], embedded) for _ in range(2))),
        ),
        conv_norm_out=GroupNorm(widths[0]),
        conv_act=Outline(),
        conv_out=Conv2d(widths[0], config["out_channels"]),
    )
    network.config = SimpleNamespace(block_out_channels=widths, out_channels=config["out_channels"])
    return network


def _is_known(config: Mapping[str, Any]) -> bool:
    """Return whether every setting is there, known, and of a value that diffusers takes."""
    if set(config) - _IGNORED != _KEYS:
        return False
    widths, down, up = (config[name] for name in _BLOCKS)
    return (
        all(config[name] == value and type(config[name]) is type(value) for name, value in _FIXED.items())
        and all(_is_whole(config[name], _LARGEST_WIDTH) for name in _WHOLE)
        and all(config[name] is None or _is_whole(config[name], _LARGEST_WIDTH) for name in _OPTIONAL)
        and all(type(config[name]) is bool for name in _SWITCHES)
        and all(type(config[name]) in (int, float) for name in _NUMBERS)
        and 0 <= config["dropout"] <= 1
        and config["downsample_padding"] in range(_LARGEST_PADDING + 1)
        and type(config["downsample_padding"]) is int
        and config["layers_per_block"] <= _MOST_LAYERS
        and all(type(names) is list and len(names) == len(widths) for names in (widths, down, up))
        and 1 <= len(widths) <= _MOST_BLOCKS
        and all(_is_whole(width, _LARGEST_WIDTH) for width in widths)
        and all(name in _DOWN_BLOCKS for name in down)
        and all(name in _UP_BLOCKS for name in up)
    )


def _is_whole(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _down_blocks(kinds: Sequence[str], widths: Sequence[int], layers: int, embedded: int) -> ModuleList:
    blocks: list[Outline] = []
    for index, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
        entering = [widths[max(index - 1, 0)], *[width] * (layers - 1)]
        resnets = [Resnet(each, width, embedded) for each in entering]
        sampler = None if index == len(widths) - 1 else _sampler(width)
        blocks.append(_block(kind, resnets, width, downsamplers=sampler))
    return ModuleList(*blocks)


def _up_blocks(kinds: Sequence[str], widths: Sequence[int], layers: int, embedded: int) -> ModuleList:
    """Return the up blocks; each resnet reads the hidden state and, concatenated, a skip input."""
    blocks: list[Outline] = []
    backwards = list(reversed(widths))
    for index, (kind, width) in enumerate(zip(kinds, backwards, strict=True)):
        hidden = [backwards[max(index - 1, 0)], *[width] * (layers - 1)]
        skips = [*[width] * (layers - 1), backwards[min(index + 1, len(widths) - 1)]]
        resnets = [Resnet(sum(pair), width, embedded) for pair in zip(hidden, skips, strict=True)]
        sampler = None if index == len(widths) - 1 else _sampler(width)
        blocks.append(_block(kind, resnets, width, upsamplers=sampler))
    return ModuleList(*blocks)


def _block(kind: str, resnets: Sequence[Resnet], width: int, **sampler: ModuleList | None) -> Outline:
    attentions = ModuleList(*(Attention(width) for _ in resnets))
    made, has_attention = _BLOCK_KINDS[kind]
    parts = {"attentions": attentions} if has_attention else {}
    return made(**parts, resnets=ModuleList(*resnets), **sampler)


def _sampler(width: int) -> ModuleList:
    return ModuleList(Outline(conv=Conv2d(width, width)))
