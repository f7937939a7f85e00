"""The modules of `benchmarks/paper`, and what the paper prints."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"


def module_at(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_module() -> Callable[[str, Path], ModuleType]:
    """`load_module("name", path)`: a module that no import statement finds."""
    return module_at


@pytest.fixture(scope="module")
def paper() -> Iterator[dict[str, Any]]:
    """The modules of `benchmarks/paper`, which import each other by their bare names, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PAPER))
        names = (
            "paper_rows",
            "paper_files",
            "paper_table_file",
            "paper_configs",
            "paper_conditions",
            "paper_stages",
            "paper_stand_ins",
            "paper_table",
        )
        modules: dict[str, Any] = {name: importlib.import_module(name) for name in names}
        modules["run"] = module_at("paper_run", PAPER / "run.py")
        yield modules
        for name in names:
            del sys.modules[name]


@pytest.fixture(scope="session")
def printed() -> Any:
    """The module beside this file."""
    return module_at("printed", Path(__file__).with_name("printed.py"))
