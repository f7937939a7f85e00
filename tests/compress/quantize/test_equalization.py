"""Weight dilation: the float model stays, no weight range grows, what is stored is smaller in effect."""

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from errata.compress.quantize.equalization import Link, dilation, equalize_, links, rescale_
from errata.compress.quantize.quantizers import quantize_weight
from errata.errors import RecipeError
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.scheme import LayerScheme, Scheme


def scheme_of(unet: nn.Module) -> Scheme:
    layers = tuple(
        LayerScheme(name=name, kind="linear", weight_bits=4, activation_bits=8, input_widths=(1,))
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    )
    return Scheme(layers=layers)


@pytest.fixture(params=[False, True], ids=["conv projection", "linear projection"])
def text_unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    """A conditional network with every kind of link, its normalizations away from one and zero."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=8,
        norm_num_groups=4,
        use_linear_projection=request.param,
    ).eval()
    return spread(unet)


@torch.no_grad()
def spread(unet: Any) -> Any:
    """Gives every normalization and every input channel of a weight a size of its own."""
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.uniform_(0.5, 2.0)
            module.bias.uniform_(-1.0, 1.0)
        if isinstance(module, nn.Linear):
            module.weight *= torch.rand(module.in_features) * 0.95 + 0.05
    return unet


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def test_the_float_text_model_is_unchanged(text_unet: UNet2DConditionModel) -> None:
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    before = text_unet(x, 500, text).sample
    changed = equalize_(text_unet, scheme_of(text_unet))
    assert relative(text_unet(x, 500, text).sample, before) < 1e-5
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    for name in (
        "norm1.weight", "norm1.bias", "attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight",
        "attn1.to_out.0.weight", "norm2.weight", "attn2.to_q.weight", "attn2.to_out.0.weight", "norm3.bias",
        "ff.net.0.proj.weight", "ff.net.0.proj.bias", "ff.net.2.weight",
    ):  # fmt: skip
        assert f"{block}.{name}" in changed
    assert {"down_blocks.0.attentions.0.norm.weight", "down_blocks.0.attentions.0.proj_in.weight"} <= set(
        changed
    )
    assert f"{block}.attn2.to_k.weight" not in changed  # it reads the text


@torch.no_grad()
def test_the_float_image_model_is_unchanged(tiny_pipeline: DDIMPipeline) -> None:
    unet = spread(copy.deepcopy(tiny_pipeline.unet))
    x = torch.randn(2, 1, 8, 8)
    before, original = unet(x, 500).sample, copy.deepcopy(unet.state_dict())
    changed = equalize_(unet, Scheme.of(unet, Recipe.named("w4a8"), branch=0))
    assert relative(unet(x, 500).sample, before) < 1e-5
    assert changed == tuple(
        sorted(name for name, value in unet.state_dict().items() if not torch.equal(value, original[name]))
    )
    assert {name.split(".")[-2] for name in changed} == {"group_norm", "to_q", "to_k", "to_v", "0"}


@torch.no_grad()
def test_every_link_folds_and_a_wrong_fold_shows(text_unet: UNet2DConditionModel) -> None:
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    before = text_unet(x, 500, text).sample
    kinds = set()
    for link in links(text_unet):
        factors = torch.rand(link.channels) + 0.5
        right, wrong = copy.deepcopy(text_unet), copy.deepcopy(text_unet)
        rescale_(right, link, factors)
        rescale_(wrong, link, factors)
        reader: Any = wrong.get_submodule(link.readers[-1])
        reader.weight /= factors.reshape(1, -1, *[1] * (reader.weight.ndim - 2))
        good = relative(right(x, 500, text).sample, before)
        bad = relative(wrong(x, 500, text).sample, before)
        assert good < 1e-5, link
        assert bad > 10 * good, link
        kinds.add(link.producer.rpartition(".transformer_blocks.0.")[2])
    assert {"norm1", "norm2", "norm3", "attn1.to_v", "attn2.to_v", "ff.net.0.proj"} <= kinds


def test_the_gate_of_a_geglu_is_left_alone(text_unet: UNet2DConditionModel) -> None:
    name = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
    before = text_unet.get_submodule(name).bias.detach().clone()
    equalize_(text_unet, scheme_of(text_unet))
    after = text_unet.get_submodule(name).bias.detach()
    half = len(before) // 2
    assert torch.equal(after[half:], before[half:])
    assert not torch.equal(after[:half], before[:half])


def test_no_weight_range_grows_and_no_factor_can_be_larger(tiny_pipeline: DDIMPipeline) -> None:
    unet = spread(copy.deepcopy(tiny_pipeline.unet))
    for link in links(unet):
        factors = dilation(unet, link, link.readers)
        assert bool((factors >= 1).all())
        weights = torch.cat([unet.get_submodule(name).weight.detach() for name in link.readers])
        dilated = weights * factors
        limit = weights.abs().amax(dim=1)
        assert bool((dilated.abs().amax(dim=1) <= limit * (1 + 1e-6)).all())
        # Every channel has come to a limit in some row.
        assert bool((dilated.abs() >= limit[:, None] * (1 - 1e-5)).any(dim=0).all())


def test_dilation_is_the_closed_form() -> None:
    reader = nn.Linear(3, 2)
    reader.weight.data.copy_(torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0]]))
    unet = nn.Sequential(nn.LayerNorm(3), reader)
    link = Link(producer="0", channels=3, readers=("1",))
    # Column 0 holds the largest weight of row 0, column 1 that of row 1, column 2 is not used at all.
    assert dilation(unet, link, ["1"]).tolist() == [1.0, 1.0, 1.0]
    reader.weight.data[1, 1] = 0.5
    assert dilation(unet, link, ["1"]).tolist() == [1.0, 2.0, 1.0]
    assert dilation(unet, link, []).tolist() == [1.0, 1.0, 1.0]


@torch.no_grad()
def test_small_input_channels_come_closer_after_rounding() -> None:
    norm, reader = nn.LayerNorm(32), nn.Linear(32, 8)
    reader.weight[:, 1:] *= 0.05
    reader.weight[:, 0] = reader.weight.abs().amax() * 1.5  # one column holds every range
    unet = nn.Sequential(norm, reader)
    x = torch.randn(256, 32)

    def error() -> float:
        codes, scale = quantize_weight(reader.weight, bits=4)
        rounded = nn.functional.linear(norm(x), codes * scale[:, None], reader.bias)
        return relative(rounded, unet(x))

    link = Link(producer="0", channels=32, readers=("1",))
    before = error()
    rescale_(unet, link, dilation(unet, link, ["1"]))
    assert error() < 0.5 * before


def test_nothing_happens_where_no_reader_is_quantized(tiny_pipeline: DDIMPipeline) -> None:
    unet = copy.deepcopy(tiny_pipeline.unet)
    assert equalize_(unet, Scheme()) == ()
    assert all(
        torch.equal(a, b)
        for a, b in zip(unet.state_dict().values(), tiny_pipeline.unet.state_dict().values(), strict=True)
    )


def test_a_network_of_resnets_has_no_link(make_plain_unet: Any) -> None:
    unet: UNet2DModel = make_plain_unet(add_attention=False)
    assert links(unet) == ()


def test_half_precision_is_refused(tiny_pipeline: DDIMPipeline) -> None:
    unet = copy.deepcopy(tiny_pipeline.unet).half()
    with pytest.raises(RecipeError, match="float32 weights"):
        equalize_(unet, Scheme())
