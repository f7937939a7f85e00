"""Rules of this repository that no other tool checks."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import import_graph  # type: ignore[import-not-found]  # noqa: E402 - a script, found by the line above

STAGES = ("runtime", "calibration", "compress", "deploy", "correct", "report")
FOLDERS = {"errata": "core"} | {f"errata.{stage}": stage for stage in STAGES}
ORDER = list(FOLDERS)[1:]  # data flows one way: a stage imports only those before it
SOURCES = sorted(path for folder in FOLDERS.values() for path in (ROOT / folder).rglob("*.py"))
PACKAGES = [name for name, folder in FOLDERS.items() if (ROOT / folder / "__init__.py").exists()]
GRAPH = import_graph.read_graph()
# Modules that import each other, inside functions. May only become fewer.
KNOWN_CYCLES: list[tuple[str, ...]] = []
# Modules that a single other one imports, as a share of all. May only become smaller.
MOST_IMPORTED_ONCE = 0.185
# What the base of the package, in core/, may not know: anything that is built on it.
FRONT_DOOR = ("errata.cli", "errata.demo", "errata.quality")


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


def test_modules_do_not_import_each_other() -> None:
    assert import_graph.cycles(GRAPH) == KNOWN_CYCLES


def test_few_modules_have_a_single_importer() -> None:
    graph = import_graph.read_graph(with_types=True)
    found = import_graph.imported_once(graph)
    share = len(found) / len(graph)
    assert share <= MOST_IMPORTED_ONCE, "merge a module into its only user, or a fitting neighbour"


def imports_of(stage: str, other: str) -> list[tuple[str, str]]:
    """Modules of a stage with the modules of the other that they import, inside functions too."""
    return [
        (name, imported)
        for name, found in GRAPH.items()
        for imported in sorted(found)
        if import_graph.stage_of(name) == stage and import_graph.stage_of(imported) == other
    ]


def test_the_runtime_imports_the_base_alone() -> None:
    assert all(imports_of("runtime", stage) == [] for stage in STAGES if stage != "runtime")


def test_nothing_that_runs_artifacts_imports_compress() -> None:
    assert imports_of("deploy", "compress") == [("errata.deploy.exporting", "errata.compress")]
    assert imports_of("correct", "compress") == imports_of("report", "compress") == []


def test_the_base_imports_no_stage() -> None:
    upward = [
        (name, imported)
        for name, found in GRAPH.items()
        for imported in sorted(found)
        if import_graph.stage_of(name) == "core" and not name.startswith(FRONT_DOOR)
        if import_graph.stage_of(imported) != "core" or imported.startswith(FRONT_DOOR)
    ]
    assert upward == []


def test_the_graph_knows_imports_of_every_kind(tmp_path: Path) -> None:
    for stage in import_graph.STAGES:
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "__init__.py").touch()
    (tmp_path / "deploy" / "one.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import errata.report\n"
        "def late():\n    from errata.correct import two\n"
    )
    (tmp_path / "correct" / "two.py").write_text("from errata.deploy.one import late\nimport errata.errors\n")
    (tmp_path / "core" / "errors.py").touch()
    graph = import_graph.read_graph(tmp_path)
    assert graph["errata.deploy.one"] == {"errata.correct.two"}
    assert graph["errata.correct.two"] == {"errata.deploy.one", "errata.errors"}
    assert import_graph.cycles(graph) == [("errata.correct.two", "errata.deploy.one")]
    assert import_graph.imported_once(graph) == ["errata.correct.two", "errata.deploy.one", "errata.errors"]
    assert "errata.report" in import_graph.read_graph(tmp_path, with_types=True)["errata.deploy.one"]
    assert "correct -->|1| deploy" in import_graph.mermaid(graph)


def test_the_errors_are_importable_from_the_front_door() -> None:
    errata, errors = importlib.import_module("errata"), importlib.import_module("errata.errors")
    assert set(errors.__all__) == {name for name in errata.__all__ if not name.startswith("_")}
    assert all(getattr(errata, name) is getattr(errors, name) for name in errors.__all__)


def test_exceptions_are_called_errors() -> None:
    names = [
        (name_of(source), node.name)
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        if any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)
    ]
    assert len(names) > 8
    assert [(file, name) for file, name in names if not name.endswith("Error")] == []


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
