from types import SimpleNamespace
from typing import Any

from errata.compress import Quantization, Recipe
from errata.report.protocol import exception_notes


def artifact(quantization: Quantization | None) -> Any:
    recipe = Recipe.named("deepcache-2") if quantization is None else Recipe(quantization=quantization)
    return SimpleNamespace(manifest=SimpleNamespace(recipe=recipe))


def test_a_report_names_what_a_recipe_treats_otherwise() -> None:
    mixed = Quantization(
        weight_bits=4, activation_bits=8, bits={"mid_block": 8}, modules_to_not_convert=("conv_in",)
    )
    plain = Quantization(weight_bits=4, activation_bits=8)
    artifacts = {"mixed": artifact(mixed), "plain": artifact(plain), "cache": artifact(None)}
    assert exception_notes(artifacts) == ("mixed: 8-bit weights in mid_block; not quantized: conv_in.",)
