import json
from typing import Any

import pytest
import yaml

from errata.compress import CacheQuant, DeepCache, LearnedRounding, Quantization, Recipe
from errata.errors import RecipeError

W8A8 = Quantization(weight_bits=8, activation_bits=8)
W4A8 = Quantization(weight_bits=4, activation_bits=8)
NAMES = [
    "w8a8", "w6a8", "w4a8", "w6a8-learned", "w8a8-learned", "w4a8-learned", "deepcache-5", "cachequant-5",
    "w8a8+deepcache-10", "w4a8+deepcache-3:branch=1", "w4a8-learned+cachequant-5",
    "w4a8-learned:iterations=3000", "w4a8-learned:samples=64", "w4a8-learned:batch_size=8",
    "w4a8-learned:seed=7", "w4a8-learned:learning_rate=0.001", "w4a8-learned:learning_rate=1e-05",
    "w4a8-learned:scale_learning_rate=0.0", "w4a8:bias_correction=true", "w8a8:equalization=true",
    "w8a8:bias_correction=true,equalization=true", "deepcache-5:branch=2",
    "deepcache-5:spacing=power", "deepcache-5:spacing=power,center=15.0,power=1.2",
    "deepcache:steps=0/3/7", "w8a8+deepcache:branch=1,steps=0", "cachequant-5:branch=1",
    "cachequant-5:search=uniform", "cachequant-5:correction=false", "cachequant-5:corrected_by=iec",
    "w4a8-learned+cachequant-5:iterations=500,branch=1,corrected_by=iec",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_and_both_texts_round_trip(name: str) -> None:
    recipe = Recipe.named(name)
    assert recipe.name == name
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    assert Recipe.from_text(json.dumps(recipe.to_json())) == recipe


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("w4a8+deepcache-10:branch=2", Recipe(quantization=W4A8, cache=DeepCache(interval=10, branch=2))),
        ("deepcache-10+w4a8", Recipe(quantization=W4A8, cache=DeepCache(interval=10))),
        ("deepcache:steps=7/0/3", Recipe(cache=DeepCache(steps=(0, 3, 7)))),
        (
            "deepcache-4:spacing=power,center=2,power=2",
            Recipe(cache=DeepCache(interval=4, spacing="power", center=2.0, power=2.0)),
        ),
        (
            "w8a8+cachequant-5:corrected_by=iec,search=uniform",
            Recipe(quantization=W8A8, cache=CacheQuant(interval=5, search="uniform", corrected_by="iec")),
        ),
        (
            "w4a8-learned:iterations=10,equalization=true",
            Recipe(
                quantization=Quantization(
                    weight_bits=4,
                    activation_bits=8,
                    rounding=LearnedRounding(iterations=10),
                    equalization=True,
                )
            ),
        ),
    ],
)
def test_a_name_means_what_it_says(name: str, recipe: Recipe) -> None:
    assert Recipe.named(name) == recipe


def test_an_option_at_its_default_is_left_out_of_the_name() -> None:
    assert Recipe.named("cachequant-5:search=dps,correction=true").name == "cachequant-5"
    assert Recipe.named("w4a8-learned:iterations=400").name == "w4a8-learned"


def test_what_only_a_file_can_say_is_marked_in_the_name() -> None:
    quantization = Quantization(weight_bits=4, activation_bits=8, bits={"mid_block": 8})
    recipe = Recipe(quantization=quantization, cache=DeepCache(interval=5, branch=1))
    assert recipe.name == "w4a8+deepcache-5:branch=1*"
    assert Recipe.from_text(recipe.to_yaml()) == recipe
    spared = Quantization(weight_bits=8, activation_bits=8, modules_to_not_convert=("conv_in",))
    assert Recipe(quantization=spared).name == "w8a8*"
    assert Recipe.from_json(Recipe(quantization=spared).to_json()).quantization == spared
    with pytest.raises(RecipeError, match="cannot read 'branch=1\\*'"):
        Recipe.named(recipe.name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w3a8", "unknown recipe 'w3a8'.*allowed are w8a8"),
        ("w4a4", "unknown recipe 'w4a4': activations have 8 bits in every recipe, because .*; use w4a8$"),
        ("w4a4-learned+deepcache-5", "activations have 8 bits.*; use w4a8-learned$"),
        ("w3a4", "unknown recipe 'w3a4': cannot read 'w3a4'"),
        ("w5a8", "unknown recipe 'w5a8'.*allowed are w8a8, w6a8, w4a8, w8a8-learned"),
        ("", "unknown recipe ''"),
        ("w8a8+w4a8", "cannot read 'w4a8'"),
        ("deepcache-3+cachequant-3", "cannot read 'cachequant-3'"),
        ("w8a8+", "cannot read ''"),
        ("w8a8-rounded", "cannot read 'w8a8-rounded'"),
        ("deepcache-x", "cannot read 'deepcache-x'"),
        ("deepcache-0", "interval must be a whole number, at least 1"),
        ("cachequant-0", "interval must be a whole number, at least 1"),
        ("deepcache", "a cache needs either an interval, as in deepcache-5, or a list of full steps"),
        ("cachequant", "cachequant needs an interval, as in cachequant-5"),
        ("deepcache-5:branch=0", "must recompute at least 1"),
        ("deepcache-5:depth=3", "unknown option 'depth=3'; allowed are iterations, samples"),
        ("deepcache-5:branch", "cannot read 'branch'; branch takes a whole number"),
        ("deepcache-5:branch=1.5", "cannot read 'branch=1.5'"),
        ("deepcache-5:branch=-1", "cannot read 'branch=-1'"),
        ("deepcache-5:branch=1_0", "cannot read 'branch=1_0'"),
        ("deepcache-5:", "unknown option ''"),
        ("deepcache-5:branch=1,", "unknown option ''"),
        ("deepcache-5:branch=1,branch=2", "gives option 'branch' twice"),
        ("w8a8:branch=1", "option 'branch' does not apply: it belongs to deepcache-N or cachequant-N"),
        ("w4a8:iterations=5", "option 'iterations' does not apply: it belongs to w4a8-learned"),
        ("deepcache-5:equalization=true", "'equalization' does not apply: it belongs to w4a8"),
        ("deepcache-5:search=dps", "option 'search' does not apply: it belongs to cachequant-N"),
        ("cachequant-5:steps=0/3", "option 'steps' does not apply: it belongs to deepcache-N"),
        ("deepcache-5:steps=0/3", "a cache needs either an interval.*or a list of full steps"),
        ("deepcache:steps=1/3", "full steps must be different from each other and include 0"),
        ("deepcache:steps=0/3/3", "full steps must be different"),
        ("deepcache:steps=", "cannot read 'steps='; steps takes step numbers such as 0/4/9"),
        ("deepcache:steps=0/3,spacing=power", "either explicit steps or spacing=power"),
        ("deepcache-5:spacing=log", "spacing='log' is unknown; allowed are uniform and power"),
        ("deepcache-5:center=3", "center=3.0 has no effect without spacing=power"),
        ("deepcache-5:spacing=power,center=-3", "center=-3.0; allowed are step numbers from 0"),
        ("deepcache-5:spacing=power,center=nan", "center=nan; allowed are step numbers from 0"),
        ("deepcache-5:spacing=power,power=1", "power=1.0; allowed are numbers above 1"),
        ("deepcache-5:spacing=power,power=nan", "power=nan; allowed are numbers above 1"),
        ("deepcache-5:power=2", "power=2.0 has no effect without spacing=power"),
        ("cachequant-5:search=greedy", "search='greedy' is unknown; allowed are dps and uniform"),
        ("cachequant-5:corrected_by=ddim", "corrected_by='ddim' is unknown; allowed is iec"),
        ("cachequant-5:correction=no", "cannot read 'correction=no'; correction takes true or false"),
        ("cachequant-5:correction=false,corrected_by=iec", "has no effect with correction=false"),
        ("w4a8-learned:learning_rate=0", "learning_rate=0.0; allowed are finite numbers above 0"),
        ("w4a8-learned:learning_rate=nan", "learning_rate=nan"),
        ("w4a8-learned:iterations=0", "iterations=0; allowed are whole numbers of at least 1"),
    ],
)
def test_unreadable_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.named(name)


def text(**changes: Any) -> str:
    value = {"type": "Recipe", "schema": 2, "quantization": None, "cache": None} | changes
    return json.dumps({key: item for key, item in value.items() if item != "absent"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "a recipe is a mapping"),
        ("a: [", "neither JSON nor YAML"),
        (text(type="Plan"), "not a recipe of schema 2: type='Plan'"),
        (text(schema=1, cache={"interval": 5}), "not a recipe of schema 2: type='Recipe', schema=1"),
        (text(quantization="absent"), r"unknown or missing keys in the recipe: \['quantization'\]"),
        (text(x=1), r"unknown or missing keys in the recipe: \['x'\]"),
        (text(), "the recipe is empty"),
        (text(cache={"interval": 5}), "cache method None is unknown; allowed are deepcache and cachequant"),
        (
            text(cache={"method": "deepcache", "every": 2}),
            "unknown key 'every' in the recipe; DeepCache takes interval, branch",
        ),
        (text(cache={"method": "deepcache", "interval": "5"}), "at least 1, got '5'"),
        (text(cache={"method": "deepcache", "interval": True}), "at least 1, got True"),
        (text(cache={"method": "deepcache", "steps": [0, 1.5]}), "allowed is a list of step numbers"),
        (text(cache={"method": "deepcache", "steps": []}), "allowed is a list of step numbers"),
        (text(cache={"method": "cachequant"}), "cannot be read.*interval"),
        (text(cache={"method": "cachequant", "interval": 5, "correction": 1}), "correction=1; allowed"),
        (text(cache=5), "cannot be read"),
        (text(quantization={"weight_bits": 8}), "cannot be read.*activation_bits"),
        (text(quantization={"weight_bits": 8, "activation_bits": 8, "bits": {"a": 3}}), "'a': 3"),
        (
            text(quantization={"weight_bits": 8, "activation_bits": 8, "rounding": {"x": 1}}),
            "unknown key 'x'",
        ),
    ],
)
def test_unreadable_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_text(text)


def test_a_hand_written_recipe_leaves_defaults_out() -> None:
    written = {
        "type": "Recipe",
        "schema": 2,
        "quantization": {"weight_bits": 4, "activation_bits": 8, "rounding": {"iterations": 20}},
        "cache": {"method": "cachequant", "interval": 5},
    }
    assert Recipe.from_text(yaml.safe_dump(written)) == Recipe.named(
        "w4a8-learned+cachequant-5:iterations=20"
    )


@pytest.mark.parametrize(("weight", "activation"), [(3, 8), (8, 4)])
def test_unsupported_bits_are_refused(weight: int, activation: int) -> None:
    with pytest.raises(RecipeError, match="is not supported; allowed"):
        Quantization(weight_bits=weight, activation_bits=activation)
