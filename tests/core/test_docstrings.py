"""What docstrings refer to exists: modules, classes, functions and files, by their names."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("runtime", "calibration", "compress", "deploy", "correct", "report")
FOLDERS = {"errata": "core"} | {f"errata.{stage}": stage for stage in STAGES}
# `errata.compress.Recipe` and `docs/compress.md` anywhere; `loading.load`, `Plan.save` between backticks.
DOTTED = re.compile(r"\berrata(?:\.[A-Za-z_]\w*)+")
QUOTED = re.compile(r"`([A-Za-z_]\w*)\.([A-Za-z_]\w*)(?:\([^`]*\))?`")
FILE = re.compile(rf"(?<![\w/])((?:{'|'.join(('core', 'docs', *STAGES))})/[\w/.-]+\.(?:py|md|c))\b")
# Names of files, and of tensors and options in files, look the same.
SUFFIXES = {"html", "json", "md", "png", "safetensors", "sig"}
KEYS = {"cache.gain", "cache.shift", "output.matrix", "output.bias", "rounding.samples", "rounding.seed"}


def module_files() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = module_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def names_in(tree: ast.AST) -> set[str]:
    """Return what is defined, imported or assigned anywhere in the code."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


NAMES = {name: names_in(tree) for name, tree in TREES.items()}
CLASSES = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Every docstring, and every text below a name that describes it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            texts = [part.value for part in node.body if isinstance(part, ast.Expr)]
            yield from (str(text.value) for text in texts if isinstance(text, ast.Constant))


def exists(dotted: str) -> bool:
    """Whether a full name leads to a module, or to what is in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        module, rest = ".".join(parts[:length]), parts[length:]
        if module in MODULES:
            return not rest or (rest[0] in NAMES[module] and all(map(is_member, rest, rest[1:])))
    return False


def is_member(owner: str, name: str) -> bool:
    """Whether a class of that name has that member; classes with bases may inherit any."""
    found = [node for node in CLASSES if node.name == owner]
    return not found or any(node.bases or name in names_in(node) for node in found)


def is_known(owner: str, name: str) -> bool:
    """Whether the short form names what exists, where its first part is a module or class of errata."""
    if name in SUFFIXES or f"{owner}.{name}" in KEYS:
        return True
    modules = [module for module in MODULES if module.rpartition(".")[2] == owner]
    if modules:
        return any(name in NAMES[module] or f"{module}.{name}" in MODULES for module in modules)
    return is_member(owner, name)


def unresolved(text: str) -> list[str]:
    """Return the names in a docstring that lead nowhere."""
    dotted = [name for name in DOTTED.findall(text) if name.rpartition(".")[2] not in SUFFIXES]
    return [
        *(name for name in dotted if not exists(name)),
        *(f"{owner}.{name}" for owner, name in QUOTED.findall(text) if not is_known(owner, name)),
        *(path for path in FILE.findall(text) if not (ROOT / path).exists()),
    ]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_names_in_docstrings_exist(module: str) -> None:
    assert [name for text in docstrings(TREES[module]) for name in unresolved(text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "as `errata.quality.Nothing()`",
        "see errata.compress.nothing",
        "see `errata.correct.plans.Plan.nothing`",
        "see `loading.nothing`",
        "a `Plan.nothing()`",
        "see docs/nothing.md",
    ],
)
def test_a_name_that_leads_nowhere_is_found(text: str) -> None:
    assert len(unresolved(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "as `errata.quality.paired.Lpips()`, in `errata.json` and `unet/errata.safetensors`",
        "see `errata.correct.plans.Plan.save`, `Plan.save(path)`, `torch.nn` and docs/compress.md",
    ],
)
def test_names_that_exist_are_not(text: str) -> None:
    assert unresolved(text) == []
