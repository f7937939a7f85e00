"""An outline is the network that diffusers makes of the same settings, module by module."""

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from errata.embedded import PIPELINE
from errata.runtime.outline import Outline, kind_of
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.scheme import Scheme
from errata.runtime.structure import embedding_layers, largest_branch, skip_widths, up_resnets
from errata.runtime.unet_outline import unet_outline

TWO = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "diffusers' defaults": {},
    "two blocks": TWO,
    "one layer a block": {**TWO, "layers_per_block": 1, "in_channels": 1, "out_channels": 2},
    "one head": {**TWO, "attention_head_dim": None, "sample_size": 32, "downsample_padding": 0},
    "another embedding": {**TWO, "time_embedding_dim": 20, "freq_shift": 1, "flip_sin_to_cos": False},
    "one block": {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 8,
        "layers_per_block": 3,
    },
    "widths that fall": {**TWO, "block_out_channels": (24, 8), "norm_num_groups": 2},
    "DDPM-CIFAR10": {
        "attention_head_dim": None,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}
RECIPES = ("w8a8", "w4a8+cachequant-3", "deepcache-3", "w8a8+deepcache-2:branch=1")


def made(**settings: Any) -> tuple[UNet2DModel, dict[str, Any]]:
    with torch.device("meta"):
        unet = UNet2DModel(**settings)
    return unet, json.loads(unet.to_json_string())


def is_like(module: nn.Module, outline: Outline) -> bool:
    if kind_of(module) in (None, "attention"):
        return kind_of(module) == kind_of(outline)
    names = ("in_channels", "out_channels", "in_features", "out_features", "groups", "padding_mode")
    return kind_of(module) == kind_of(outline) and all(
        getattr(outline, name) == getattr(module, name) for name in names if hasattr(module, name)
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_it_has_the_same_modules_and_parameters_in_the_same_order(name: str) -> None:
    unet, settings = made(**NETWORKS[name])
    outline = unet_outline(settings)
    assert outline is not None
    modules, outlines = list(unet.named_modules()), list(outline.named_modules())
    assert [name for name, _ in modules] == [name for name, _ in outlines]
    assert all(is_like(module, found) for (_, module), (_, found) in zip(modules, outlines, strict=True))
    parameters = [(name, tuple(value.shape), str(value.dtype)) for name, value in unet.state_dict().items()]
    assert parameters == [(name, value.shape, value.dtype) for name, value in outline.state_dict().items()]


@pytest.mark.parametrize("name", NETWORKS)
def test_whatever_is_derived_from_it_is_the_same(name: str) -> None:
    unet, settings = made(**NETWORKS[name])
    outline = unet_outline(settings)
    assert outline is not None
    for derive in (up_resnets, skip_widths, embedding_layers, largest_branch):
        assert derive(outline) == derive(unet)
    for recipe in map(Recipe.named, RECIPES):
        branch = 0 if recipe.cache is None else recipe.cache.branch or 1
        assert Scheme.of(outline, recipe, branch=branch) == Scheme.of(unet, recipe, branch=branch)


def test_the_embedded_model_has_one() -> None:
    settings = json.loads((PIPELINE / "unet" / "config.json").read_text())
    del settings["_name_or_path"]  # which no artifact has
    assert unet_outline(settings) is not None


@pytest.mark.parametrize(
    "change",
    [
        {"act_fn": "gelu"},
        {"add_attention": False},
        {"add_attention": 1},
        {"attention_head_dim": 3},
        {"attn_norm_num_groups": 4},
        {"block_out_channels": [8]},
        {"block_out_channels": [8, 16.0]},
        {"block_out_channels": [8, 18]},
        {"class_embed_type": "timestep"},
        {"center_input_sample": 0},
        {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]},
        {"down_block_types": "DownBlock2D"},
        {"downsample_padding": 65},
        {"downsample_padding": 1.0},
        {"downsample_type": "resnet"},
        {"dropout": 2},
        {"layers_per_block": 17},
        {"layers_per_block": True},
        {"in_channels": 0},
        {"mid_block_type": None},
        {"norm_eps": "1e-5"},
        {"norm_num_groups": None},
        {"num_class_embeds": 10},
        {"resnet_time_scale_shift": "scale_shift"},
        {"sample_size": [8, 8]},
        {"time_embedding_type": "fourier"},
        {"up_block_types": ["UpBlock2D", "DownBlock2D"]},
        {"_class_name": "UNet2DConditionModel"},
        {"unknown": 1},
    ],
    ids=str,
)
def test_other_settings_have_none(change: dict[str, Any]) -> None:
    _, settings = made(**TWO)
    assert unet_outline(settings) is not None
    assert unet_outline({**settings, **change}) is None


def test_a_missing_setting_has_none() -> None:
    _, settings = made(**TWO)
    for name in set(settings) - {"_class_name", "_diffusers_version"}:
        assert unet_outline({key: value for key, value in settings.items() if key != name}) is None


def test_what_is_not_there_is_an_attribute_error() -> None:
    outline = Outline(one=Outline(), none=None)
    assert outline.none is None
    with pytest.raises(AttributeError, match="Outline has no 'two'"):
        _ = outline.two
    for name in ("two", "none", "one.two"):
        with pytest.raises(AttributeError, match=f"there is no module '{name}'"):
            outline.get_submodule(name)
