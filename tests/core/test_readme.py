"""What the README and docs/ show exists: commands of every page parse, names resolve, recipes are known.

That the Python examples run is in `test_pages.py`.
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from errata import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "compress.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    (page.name, command): None  # a dictionary keeps the order, and each once
    for page in PAGES
    for command in re.findall(r"^    (errata .+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}
# A quantizer with bits, or a cache with its interval or steps, or both, wherever a page names one.
NAME = r"`((?:w\d+a\d+|(?:deepcache|cachequant)(?:-\d|:))[a-z0-9+=:/.,_-]*)`"
# A page that adds weight formats names recipes that only it has.
ADDS_RECIPES = "extend-weight-format.md"
RECIPES = sorted(
    {
        name
        for page in PAGES
        if page.name != ADDS_RECIPES
        for name in re.findall(NAME, page.read_text(encoding="utf-8"))
    }
)
(PYTHON,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) >= 25
    assert {
        "README.md",
        "compress.md",
        "correct.md",
        "deploy.md",
        "make-it-smaller.md",
        "report.md",
        "scale.md",
    } <= {page for page, _ in COMMANDS}
    assert {
        "w4a8",
        "w4a8-learned",
        "w8a8+deepcache-10:branch=1",
        "deepcache-10:spacing=power,center=20,power=1.4",
        "w4a8-learned+cachequant-5:iterations=2000,corrected_by=iec",
    } <= set(RECIPES)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page: str, command: str) -> None:
    assert cli.build_parser().parse_args(shlex.split(command)[1:]).run


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_known(name: str) -> None:
    from errata.compress import Recipe

    recipe = Recipe.named(name)
    assert Recipe.named(recipe.name) == recipe


def test_every_option_of_a_recipe_is_described() -> None:
    from errata.runtime.recipes.recipe import _READERS

    assert [option for option in _READERS if not re.search(rf"`{option}\b", GUIDE)] == []


def test_python_uses_public_names() -> None:
    tree = ast.parse(PYTHON)
    stages = {"calibration", "compress", "correct", "deploy", "report"}
    used = {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in stages
    }
    assert {stage for stage, _ in used} == stages
    missing = [
        f"{stage}.{name}"
        for stage, name in used
        if name not in importlib.import_module(f"errata.{stage}").__all__
    ]
    assert missing == []
