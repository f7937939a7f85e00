"""What the pages say of errata's own files is so: paths exist, and hold the names told beside them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
EXTENDING = [page for page in PAGES if page.startswith("docs/extend-")]
# Files that the example of a page would add.
ADDED = {
    "docs/extend-corrector.md": {"correct/methods/two_step.py", "tests/correct/methods/test_two_step.py"}
}
PATH = re.compile(r"`((?:[a-z_]+/)+[\w.]*)`")
# Classes, constants and private names, and members of those; the last part is looked for.
NAME = re.compile(r"`(?:[A-Z_]\w*\.)*((?<=\.)\w+|[A-Z_]\w*)(?:\([^`]*\))?`")
STAGES = ("core", "runtime", "calibration", "compress", "deploy", "correct", "report")
FOLDERS = (*STAGES, "tests", "scripts", "benchmarks")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def paths_in(text: str) -> list[str]:
    """Paths of the repository in backticks."""
    return [path for path in PATH.findall(text) if path.split("/")[0] in FOLDERS]


def rows(page: str) -> list[str]:
    """Rows of the tables that start with a path of the repository."""
    table = [line for line in text_of(page).splitlines() if line.startswith("| `")]
    return [line for line in table if paths_in(line.split(" | ")[0])]


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    given = set(paths_in(text_of(page))) - ADDED.get(page, set())
    assert [path for path in sorted(given) if not (ROOT / path).exists()] == []


def test_there_is_something_to_check() -> None:
    found = {page.removeprefix("docs/extend-"): len(rows(page)) for page in EXTENDING}
    assert min(found[page] for page in ("cache.md", "corrector.md", "pipeline.md", "quantizer.md")) >= 6
    assert min(found[page] for page in ("kernel.md", "weight-format.md")) >= 2


@pytest.mark.parametrize(("page", "row"), [(page, row) for page in EXTENDING for row in rows(page)])
def test_names_are_where_they_are_said_to_be(page: str, row: str) -> None:
    first, rest = row.removeprefix("| ").split(" | ", 1)
    files = [ROOT / path for path in paths_in(first) if path not in ADDED.get(page, set())]
    files += [file.with_name(name) for file in files[:1] for name in re.findall(r"`(\w+\.py)`", first)]
    source = "".join(file.read_text(encoding="utf-8") for file in files if file.is_file())
    names = NAME.findall(rest) if source else []
    assert [name for name in names if not re.search(rf"\b{name}\b", source)] == []
