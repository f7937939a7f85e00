"""Names that are imported when they are first asked for: they are all there, and what type checkers see."""

import ast
import importlib
from pathlib import Path

import pytest

from errata.lazy_names import lazy_names

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"errata.deploy": "deploy", "errata.deploy.engines": "deploy/engines"}
LAZY = sorted(FOLDERS)


def typed_imports(package: str) -> dict[str, tuple[str, ...]]:
    """The imports under `if TYPE_CHECKING`: names by module."""
    tree = ast.parse((ROOT / FOLDERS[package] / "__init__.py").read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {str(node.module): tuple(item.name for item in node.names) for node in imports}


def table(package: str) -> dict[str, tuple[str, ...]]:
    """The table that the package hands to `lazy_names`."""
    tree = ast.parse((ROOT / FOLDERS[package] / "__init__.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found: dict[str, tuple[str, ...]] = ast.literal_eval(calls[0].args[1])
    return found


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_what_is_imported(package: str) -> None:
    assert typed_imports(package) == table(package)


@pytest.mark.parametrize("package", LAZY)
def test_every_name_is_the_one_of_its_module(package: str) -> None:
    module = importlib.import_module(package)
    for home, names in table(package).items():
        for name in names:
            assert getattr(module, name) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("package", LAZY)
def test_star_imports_and_dir_have_every_name(package: str) -> None:
    module, found = importlib.import_module(package), dict[str, object]()
    exec(f"from {package} import *", found)
    assert set(module.__all__) <= set(found)
    assert set(module.__all__) <= set(dir(module))
    assert {name for names in table(package).values() for name in names} == set(module.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    find, _ = lazy_names("errata.deploy", {"errata.deploy.limits": ("DEEPEST_JSON",)})
    assert find("DEEPEST_JSON") == 64
    with pytest.raises(AttributeError, match="module 'errata.deploy' has no attribute 'nothing'"):
        find("nothing")
