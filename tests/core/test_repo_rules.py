"""The rules of the house that no other tool checks."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("runtime", "calibration", "compress", "deploy", "correct", "report")
FOLDERS = {"errata": "core"} | {f"errata.{stage}": stage for stage in STAGES}
ORDER = list(FOLDERS)[1:]  # data flows one way: a stage imports only those before it
SOURCES = sorted(path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py"))
PACKAGES = [name for name, folder in FOLDERS.items() if (ROOT / folder / "__init__.py").exists()]


def name_of(path: Path) -> str:
    """The source file's path in the repository, for the test's name."""
    return str(path.relative_to(ROOT))


def constants_then_classes_then_functions(name: str) -> tuple[bool, bool, str]:
    """The order in which ruff sorts names, so that test and formatter agree."""
    return not name.isupper(), not name[0].isupper(), name


def imported_modules(source: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(source)}:{node.lineno} imports relatively"
            found |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_listed_sorted_and_exist(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__, key=constants_then_classes_then_functions)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_imported_is_this_checkout(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin) == ROOT / FOLDERS[package] / "__init__.py"


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_data_flows_one_way(source: Path) -> None:
    stage = f"errata.{source.relative_to(ROOT).parts[0]}"
    if stage not in ORDER:
        return
    later = ORDER[ORDER.index(stage) + 1 :]
    upward = {
        name for name in imported_modules(source) for other in later if f"{name}.".startswith(f"{other}.")
    }
    assert upward == set(), f"{name_of(source)} imports a later stage"


def test_the_errors_are_importable_from_the_front_door() -> None:
    errata, errors = importlib.import_module("errata"), importlib.import_module("errata.errors")
    assert set(errors.__all__) == {name for name in errata.__all__ if not name.startswith("_")}
    assert all(getattr(errata, name) is getattr(errors, name) for name in errors.__all__)


def test_importing_the_front_door_is_cheap() -> None:
    program = "import sys, errata, errata.cli; print(*{'torch', 'numpy', 'diffusers'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def test_no_folder_shadows_the_package() -> None:
    assert not (ROOT / "errata").exists()


def test_no_package_in_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_nothing_is_called_utils() -> None:
    assert [name_of(path) for path in SOURCES if path.stem in {"utils", "util", "helpers", "misc"}] == []


def test_the_type_checker_sees_every_file() -> None:
    check = subprocess.run(
        [sys.executable, "scripts/link_typecheck.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 0, f"{check.stderr}run `make lint`, which repairs the links"
