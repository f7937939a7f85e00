import json
from pathlib import Path

import pytest

from errata import demo
from errata.errors import ReportError


def make_result(folder: Path, text: str = "old") -> None:
    folder.mkdir(parents=True)
    (folder / demo.MARKER).write_text("{}", encoding="utf-8")
    (folder / demo.PAGE).write_text(text, encoding="utf-8")


def fill(folder: Path, text: str = "new") -> None:
    (folder / demo.PAGE).write_text(text, encoding="utf-8")


def test_the_whole_life_ends_in_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RECIPES", ("deepcache-10", demo.OLD))
    monkeypatch.setattr(demo, "SHEET_SAMPLES", 8)
    with pytest.warns(UserWarning, match="full rank"):
        page = demo.run(tmp_path / "runs" / "demo", steps=3, samples=4, calibration_samples=2)
    assert page == tmp_path / "runs" / "demo" / "report.html"
    names = {"artifacts", "calibration", "compressed", "demo.json"}
    names |= {"report.html", "report.json", "report.md"}
    has_sheet = (page.parent / "sheet.safetensors").exists()
    names |= {"sheet.safetensors"} if has_sheet else set()
    assert {file.name for file in page.parent.iterdir()} == names
    # A cache whose only full call is the first one leaves nothing to choose.
    report = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    asked = [row for row in report["rows"] if row["role"] != "equal compute"]
    assert [(row["artifact"], row["plan"]) for row in asked] == [
        ("float", "none"),
        ("deepcache-10", "none"),
        ("deepcache-10", "iec"),
        (demo.OLD, "none"),
        (demo.OLD, "iec"),
        *[(demo.OLD, "auto + sheet")] * has_sheet,
    ]


def test_a_demo_replaces_its_own_result(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    make_result(out)
    with demo._fresh_or_replaced(out) as folder:
        fill(folder)
    assert (out / demo.PAGE).read_text(encoding="utf-8") == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["demo"]


def test_a_failed_demo_leaves_the_earlier_result(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    make_result(out)
    with pytest.raises(KeyboardInterrupt), demo._fresh_or_replaced(out) as folder:
        fill(folder)
        raise KeyboardInterrupt
    assert (out / demo.PAGE).read_text(encoding="utf-8") == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["demo"]


def test_a_demo_replaces_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ReportError, match="not the result of a demo"):
        demo.run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ReportError, match="is not a directory"):
        demo.run(tmp_path / "file")
    with pytest.raises(ReportError, match="cannot make"):
        demo.run(tmp_path / "file" / "demo")
