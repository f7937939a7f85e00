import json

import pytest

from errata.compress import DeepCache, Quantization, Recipe
from errata.errors import RecipeError

NAMES = ["w8a8", "w4a8", "deepcache-5", "w8a8+deepcache-10", "w4a8+deepcache-3:branch=1"]


@pytest.mark.parametrize("name", NAMES)
def test_names_and_both_texts_round_trip(name: str) -> None:
    recipe = Recipe.named(name)
    assert recipe.name == name
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert Recipe.from_text(json.dumps(recipe.to_json())) == recipe


def test_a_name_means_what_it_says() -> None:
    assert Recipe.named("w4a8+deepcache-10:branch=2") == Recipe(
        quantization=Quantization(weight_bits=4, activation_bits=8), cache=DeepCache(interval=10, branch=2)
    )


def test_the_default_branch_is_the_last_three_resnets_or_all_there_are() -> None:
    assert Recipe.named("deepcache-5").schedule(10, max_branch=3).branch == 3
    assert Recipe.named("deepcache-5").schedule(10, max_branch=2).branch == 2
    assert Recipe.named("w8a8").schedule(10, max_branch=3).has_cache is False


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w3a8", "unknown recipe 'w3a8'.*allowed are w8a8"),
        ("", "unknown recipe ''"),
        ("w8a8+w4a8", "cannot read 'w4a8'"),
        ("w8a8+", "cannot read ''"),
        ("deepcache-0", "interval must be a whole number, at least 1"),
        ("deepcache-5:branch=0", "must recompute at least 1"),
        ("deepcache-5:depth=3", "cannot read option 'depth=3'"),
        ("w8a8:branch=1", "needs a cache"),
        ("w4a8-learned", "not part of this version"),
        ("w8a8+cachequant-5", "not part of this version"),
    ],
)
def test_unreadable_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.named(name)


def test_a_branch_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(RecipeError, match="branch=4, but the last up block has 3 resnets"):
        Recipe.named("deepcache-5:branch=4").schedule(10, max_branch=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "a recipe is a mapping"),
        ("a: [", "neither JSON nor YAML"),
        ('{"type": "Recipe", "schema": 2}', "not a recipe of schema 1"),
        ('{"type": "Recipe", "schema": 1, "cache": null}', "cannot be read: 'quantization'"),
        ('{"type": "Recipe", "schema": 1, "cache": null, "quantization": null, "x": 1}', "unknown keys"),
        ('{"type": "Recipe", "schema": 1, "cache": null, "quantization": null}', "the recipe is empty"),
        ('{"type": "Recipe", "schema": 1, "cache": {"every": 2}, "quantization": null}', "cannot be read"),
    ],
)
def test_unreadable_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_text(text)


@pytest.mark.parametrize(("weight", "activation"), [(3, 8), (8, 4)])
def test_unsupported_bits_are_refused(weight: int, activation: int) -> None:
    with pytest.raises(RecipeError, match="is not supported; allowed"):
        Quantization(weight_bits=weight, activation_bits=activation)
