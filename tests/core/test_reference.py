"""The reference that `make docs` writes: every public name is in it, and its docstring reads as it should."""

import importlib
import re
from pathlib import Path

import pytest
from forked import ForkServer
from pdoc.doc import Module

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "errata",
    "errata.calibration",
    "errata.compress",
    "errata.deploy",
    "errata.correct",
    "errata.quality",
    "errata.report",
)
NAMES = [(package, name) for package in PACKAGES for name in importlib.import_module(package).__all__]
# The script as `python scripts/make_docs.py` runs it.
SCRIPT = f"""
import runpy, sys
sys.argv[0] = {str(ROOT / "scripts" / "make_docs.py")!r}
sys.path[0] = {str(ROOT / "scripts")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SECTIONS = ("Args", "Arguments", "Attributes", "Raises", "Returns", "Yields")


@pytest.fixture(scope="module")
def reference(forked: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "api"
    made = forked.run(SCRIPT, "--out", out)
    assert made.returncode == 0, made.stderr
    return out


def page_of(reference: Path, package: str) -> str:
    return (reference / f"{package.replace('.', '/')}.html").read_text(encoding="utf-8")


def anchors(page: str) -> set[str]:
    return set(re.findall(r'<(?:section|div) id="([\w.]+)"', page))


def test_there_is_a_page_for_each_package_and_no_other(reference: Path) -> None:
    pages = {str(path.relative_to(reference)) for path in reference.rglob("*.html")}
    assert pages == {f"{package.replace('.', '/')}.html" for package in PACKAGES} | {"index.html"}


def test_every_public_name_is_on_its_page(reference: Path) -> None:
    missing = [
        f"{package}.{name}" for package, name in NAMES if name not in anchors(page_of(reference, package))
    ]
    assert missing == []


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_public_name_has_a_docstring(package: str, name: str) -> None:
    found = Module(importlib.import_module(package)).get(name)
    assert found is not None
    assert found.docstring.strip(), f"{package}.{name} has no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_page_links_to_the_stages_that_it_names(reference: Path, package: str) -> None:
    named = set(re.findall(r"`(errata\.\w+)`", importlib.import_module(package).__doc__ or ""))
    linked = set(re.findall(r'\.html">(errata\.\w+)</a>', page_of(reference, package)))
    assert named & set(PACKAGES) - {package} <= linked


def test_sections_of_docstrings_become_lists(reference: Path) -> None:
    page = page_of(reference, "errata.calibration")
    assert re.search(r'id="[^"]*arguments">Arguments:</h6>\s*<ul>\s*<li><strong>pipe:</strong>', page)
    assert re.search(r">Raises:</h6>\s*<ul>\s*<li><strong>CalibrationError:</strong>", page)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_section_is_left_as_it_was_written(reference: Path, package: str) -> None:
    docstrings = re.findall(r'<div class="docstring">(.*?)</div>', page_of(reference, package), re.DOTALL)
    raw = re.compile(rf"<p>[^<]*\b({'|'.join(SECTIONS)}):(\s|</p>)")
    assert docstrings
    assert [text for text in docstrings if raw.search(text)] == []


def test_fields_are_told_once(reference: Path) -> None:
    """In the docstring and in the constructor, and not as a member without words each."""
    names = anchors(page_of(reference, "errata.correct"))
    assert {"IEC.__init__", "IEC.serves", "Plan.save", "RunStats"} <= names
    assert "IEC.step_size" not in names
