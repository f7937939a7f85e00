"""What the README shows exists: commands parse, names resolve, recipes are known."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from errata import cli

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (errata .+)$", README, re.MULTILINE)
RECIPES = re.findall(r"^\| `([a-z0-9+=:-]+)` \| .* \| .* \| .* \|$", README, re.MULTILINE)
(PYTHON,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) >= 7
    assert "w4a8" in RECIPES


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    assert cli.build_parser().parse_args(shlex.split(command)[1:]).run


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_known(name: str) -> None:
    from errata.compress import Recipe

    assert Recipe.named(name).name == name


def test_python_uses_public_names() -> None:
    tree = ast.parse(PYTHON)
    stages = {"calibration", "compress", "correct", "deploy"}
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
