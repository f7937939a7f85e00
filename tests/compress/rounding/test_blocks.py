from collections.abc import Callable
from typing import Any

import pytest
import torch

from errata.compress import Quantization, Recipe
from errata.compress.quantize.simulation import quantize_weights, range_table, simulate
from errata.compress.rounding.blocks import blocks_of
from errata.runtime.scheme import Scheme, sites_of
from errata.runtime.step_context import StepContext


def scheme_of(unet: Any, **options: Any) -> Scheme:
    recipe = Recipe(quantization=Quantization(weight_bits=4, activation_bits=8, **options))
    return Scheme.of(unet, recipe, branch=0)


@pytest.mark.parametrize("name", ["pixel", "resnet", "sd", "k"])
def test_every_layer_and_attention_is_in_one_block(network: Callable[[str], Any], name: str) -> None:
    unet = network(name).unet
    scheme = scheme_of(unet)
    blocks = blocks_of(unet, scheme)
    layers = [layer.name for block in blocks for layer in block.layers]
    assert sorted(layers) == sorted(layer.name for layer in scheme.layers)
    attentions = [item.name for block in blocks for item in block.attentions]
    assert sorted(attentions) == sorted(item.name for item in scheme.attentions)
    assert len({block.name for block in blocks}) == len(blocks)
    kinds = {type(unet.get_submodule(block.name)).__name__ for block in blocks}
    expected = {
        "pixel": {"ResnetBlock2D", "Attention", "Conv2d", "Linear"},
        "resnet": {"ResnetBlock2D", "Attention", "Conv2d", "Linear"},
        "sd": {"ResnetBlock2D", "BasicTransformerBlock", "Conv2d", "Linear"},
        "k": {"ResnetBlockCondNorm2D", "KAttentionBlock", "Conv2d", "Linear"},
    }
    assert kinds == expected[name]


def test_names_lead_to_the_tensors_of_the_simulated_block(network: Callable[[str], Any]) -> None:
    unet = network("sd").unet
    scheme = scheme_of(unet)
    ranges = {site.name: (torch.rand(3) + 0.1, torch.zeros(3)) for site in sites_of(scheme)}
    table = quantize_weights(unet, scheme) | range_table(ranges)
    simulated = simulate(unet, scheme, table, StepContext())
    found = set()
    for block in blocks_of(unet, scheme):
        module = simulated.get_submodule(block.name)
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        for site, name in block.scales().items():
            assert torch.equal(tensors[name], table[f"{site}.scale"])
            found.add(site)
        for layer, name in block.weights().items():
            assert tensors[name].shape == table[f"{layer}.codes"].shape
    assert found == set(ranges)


def test_a_block_without_a_quantized_layer_is_left_out(network: Callable[[str], Any]) -> None:
    unet = network("pixel").unet
    spared = "mid_block.attentions.0"
    names = [block.name for block in blocks_of(unet, scheme_of(unet, modules_to_not_convert=(spared,)))]
    assert spared not in names
    assert "mid_block.resnets.0" in names
