"""Other bits, or none, for chosen layers: from the patterns of a recipe to the artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch import nn

from errata import compress, deploy
from errata.calibration import CalibrationSet
from errata.compress import CompressedPipeline, LearnedRounding, Quantization, Recipe
from errata.compress.quantize.simulation import SimulatedLayer
from errata.deploy.verification import DENOISER_FILE
from errata.errors import RecipeError
from errata.runtime.attention import QuantizedAttention
from errata.runtime.recipes.quantization import matches
from errata.runtime.scheme import Scheme

SPARED_ATTENTION = "down_blocks.1.attentions.0"
MIXED = Quantization(
    weight_bits=4,
    activation_bits=8,
    bits={"up_blocks.1.resnets.0": 8, "*.conv_shortcut": 8, "conv_in": 4},
    modules_to_not_convert=("mid_block", "*.downsamplers.*", SPARED_ATTENTION, "conv_out"),
)


def scheme_of(unet: nn.Module, **options: Any) -> Scheme:
    quantization = Quantization(weight_bits=4, activation_bits=8, **options)
    return Scheme.of(unet, Recipe(quantization=quantization), branch=0)


def bits_of(unet: nn.Module, bits: Mapping[str, int]) -> dict[str, int]:
    return {layer.name: layer.weight_bits for layer in scheme_of(unet, bits=bits).layers}


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("conv_in", "conv_in", True),
        ("conv_in", "conv_input", False),
        ("mid_block", "mid_block.resnets.0.conv1", True),
        ("mid_block.resnets", "mid_block.resnets.0.conv1", True),
        ("mid_block.res", "mid_block.resnets.0.conv1", False),
        ("conv1", "mid_block.resnets.0.conv1", False),
        ("resnets.0", "mid_block.resnets.0.conv1", False),
        ("*.conv1", "mid_block.resnets.0.conv1", True),
        ("*conv1", "mid_block.resnets.0.conv1", True),
        ("*.resnets.?", "mid_block.resnets.0.conv1", True),
        ("*.resnets.[12]", "mid_block.resnets.0.conv1", False),
        ("*.resnets.[!12]", "mid_block.resnets.0.conv1", True),
        ("*.RESNETS.*", "mid_block.resnets.0.conv1", False),
        ("mid_block.*", "mid_block", False),
        ("mid_block", "down.mid_block", False),
    ],
)
def test_a_pattern_names_a_layer_or_what_holds_it(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_bits_follow_the_first_pattern_that_matches(tiny_pipeline: DDIMPipeline) -> None:
    unet = tiny_pipeline.unet
    plain = bits_of(unet, {})
    assert plain["conv_in"] == plain["conv_out"] == plain["time_embedding.linear_1"] == 8
    assert plain["mid_block.resnets.0.conv1"] == 4
    layer, other = "up_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv2"
    first = bits_of(unet, {layer: 4, "up_blocks.0": 8})
    assert (first[layer], first[other]) == (4, 8)
    turned = bits_of(unet, {"up_blocks.0": 8, layer: 4})
    assert (turned[layer], turned[other]) == (8, 8)
    changed = {name for name, bits in turned.items() if bits != plain[name]}
    assert changed == {
        name for name in plain if name.startswith("up_blocks.0.") and not name.endswith(".time_emb_proj")
    }


def test_a_pattern_overrules_the_layers_that_recipes_keep_at_eight_bits(tiny_pipeline: DDIMPipeline) -> None:
    found = bits_of(tiny_pipeline.unet, {"conv_in": 4, "*.time_emb_proj": 4})
    assert found["conv_in"] == 4
    assert found["conv_out"] == 8
    assert {bits for name, bits in found.items() if name.endswith(".time_emb_proj")} == {4}


def test_spared_modules_are_in_no_scheme(tiny_pipeline: DDIMPipeline) -> None:
    unet = tiny_pipeline.unet
    everything = scheme_of(unet)
    spared = scheme_of(unet, modules_to_not_convert=("mid_block", "*.to_q"))
    kept = [layer for layer in everything.layers if not layer.name.startswith("mid_block.")]
    assert list(spared.layers) == [layer for layer in kept if not layer.name.endswith(".to_q")]
    assert [attention.name for attention in spared.attentions] == [
        attention.name for attention in everything.attentions if attention.name != "mid_block.attentions.0"
    ]
    # The attention as such is spared with what holds it, not with one of its layers.
    assert any(attention.name.startswith("down_blocks.1") for attention in spared.attentions)


@pytest.mark.parametrize("options", [{"bits": {"mid_blok": 8}}, {"modules_to_not_convert": ("mid_blok",)}])
def test_a_pattern_that_matches_nothing_is_an_error(
    tiny_pipeline: DDIMPipeline, options: dict[str, Any]
) -> None:
    with pytest.raises(
        RecipeError, match="pattern 'mid_blok' .* matches no layer of this UNet2DModel.*conv_in"
    ):
        scheme_of(tiny_pipeline.unet, **options)


def test_sparing_everything_is_an_error(tiny_pipeline: DDIMPipeline) -> None:
    with pytest.raises(RecipeError, match="leaves nothing to quantize"):
        scheme_of(tiny_pipeline.unet, modules_to_not_convert=("*",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": {"conv_in": 5}}, "'conv_in': 5; allowed bits for a name pattern are 4, 6 and 8"),
        ({"bits": {"": 8}}, "allowed bits for a name pattern are 4, 6 and 8"),
        ({"modules_to_not_convert": "conv_in"}, "modules_to_not_convert='conv_in'; allowed is a list"),
        ({"modules_to_not_convert": ("",)}, "allowed is a list of name patterns"),
    ],
)
def test_bad_patterns_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Quantization(weight_bits=4, activation_bits=8, **options)


def test_patterns_survive_json_and_yaml_in_their_order() -> None:
    for rounding in (None, LearnedRounding(iterations=3)):
        quantization = Quantization(**{**vars(MIXED), "rounding": rounding})
        recipe = Recipe(quantization=quantization)
        for again in (
            Recipe.from_json(recipe.to_json()),
            Recipe.from_text(recipe.to_yaml()),
        ):
            assert again == recipe
            assert again.quantization is not None
            assert list(again.quantization.bits) == list(MIXED.bits)  # the order decides
    assert recipe.name.endswith("*")  # a name cannot say as much


@pytest.fixture(scope="module")
def mixed(
    tiny_pipeline: DDIMPipeline, tiny_calibration: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> CompressedPipeline:
    out = tmp_path_factory.mktemp("mixed") / "compressed"
    return compress.apply(tiny_pipeline, tiny_calibration, Recipe(quantization=MIXED), out)


@pytest.fixture(scope="module")
def artifact(mixed: CompressedPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deploy.export(mixed, tmp_path_factory.mktemp("mixed") / "artifact")


def spared_layers(unet: nn.Module) -> list[str]:
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not MIXED.converts(name)
    ]


def test_spared_layers_and_attentions_stay_exactly_float(mixed: CompressedPipeline) -> None:
    original: Any = mixed.float_pipe.unet
    simulated: Any = mixed.denoiser.unet.unet  # type: ignore[attr-defined]
    spared = spared_layers(original)
    assert len(spared) > 8
    x = torch.randn(2, 16, 4, 4)
    for name in spared:
        module = simulated.get_submodule(name)
        assert type(module) is type(original.get_submodule(name))
        assert torch.equal(module.weight, original.get_submodule(name).weight)
    for name, module in simulated.named_modules():
        if isinstance(module, Attention):
            is_float = name in (SPARED_ATTENTION, "mid_block.attentions.0")
            assert isinstance(module.processor, QuantizedAttention) is not is_float
    with torch.no_grad():
        found = simulated.get_submodule(SPARED_ATTENTION)(x)
        assert torch.equal(found, original.get_submodule(SPARED_ATTENTION)(x))


def test_quantized_layers_lie_on_the_grid_of_their_bits(mixed: CompressedPipeline) -> None:
    simulated: Any = mixed.denoiser.unet.unet  # type: ignore[attr-defined]
    widths = {layer.name: layer.weight_bits for layer in mixed.compression.scheme.layers}
    assert widths["conv_in"] == 4
    assert widths["up_blocks.1.resnets.0.conv1"] == widths["up_blocks.0.resnets.1.conv_shortcut"] == 8
    for name, bits in widths.items():
        assert isinstance(simulated.get_submodule(name), SimulatedLayer)
        limit = 2 ** (bits - 1) - 1
        largest = int(mixed.compression.table[f"{name}.codes"].abs().max())
        assert largest <= limit
        assert largest > 7 or bits == 4


def test_the_artifact_holds_float_weights_of_spared_layers_only(
    mixed: CompressedPipeline, artifact: Path
) -> None:
    stored = load_file(artifact / DENOISER_FILE)
    original = mixed.float_pipe.unet
    spared = spared_layers(original)
    for name in spared:
        assert torch.equal(stored[f"{name}.weight"], original.get_submodule(name).weight)
        assert f"{name}.codes" not in stored
    for layer in mixed.compression.scheme.layers:
        assert f"{layer.name}.weight" not in stored
        codes = stored[f"{layer.name}.codes"]
        weights = original.get_submodule(layer.name).weight.numel()
        assert codes.dtype is (torch.uint8 if layer.weight_bits == 4 else torch.int8)
        assert codes.numel() == (-(-weights // 2) if layer.weight_bits == 4 else weights)
    assert not any(name.startswith(f"{SPARED_ATTENTION}.query") for name in stored)


def test_the_reference_backend_is_the_simulation(mixed: CompressedPipeline, artifact: Path) -> None:
    deployed = deploy.load(artifact, device="cpu", backend="reference")
    report = {row.layer: row for row in deployed.backend_report()}
    assert not set(spared_layers(mixed.float_pipe.unet)) & set(report)
    x = torch.randn(2, 1, 8, 8)
    for step in (0, 3, 5):
        expected, _ = mixed.denoiser.full(x, step, {})
        found, _ = deployed.denoiser.full(x, step, {})
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_more_bits_come_closer(
    mixed: CompressedPipeline, tiny_pipeline: DDIMPipeline, tiny_compressed: Any
) -> None:
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = [tiny_pipeline.unet(x, time).sample for time in mixed.denoiser.timesteps]

    def error(compressed: CompressedPipeline) -> float:
        found = [compressed.denoiser.full(x, step, {})[0] for step in range(len(expected))]
        return float((torch.stack(found) - torch.stack(expected)).norm())

    assert error(tiny_compressed("w8a8")) < error(mixed) < error(tiny_compressed("w4a8"))


def test_a_stored_pipeline_comes_back(mixed: CompressedPipeline) -> None:
    again = compress.load(mixed.path)
    assert again.compression.scheme == mixed.compression.scheme
    assert again.compression.recipe == mixed.compression.recipe
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(again.denoiser.full(x, 1, {})[0], mixed.denoiser.full(x, 1, {})[0])
