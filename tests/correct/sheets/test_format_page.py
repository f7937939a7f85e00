"""docs/sheet-format.md says what the code does."""

import re
from dataclasses import fields
from pathlib import Path

from errata.correct.sheets import sheet_file
from errata.correct.sheets.fitted_maps import CallLevels
from errata.correct.sheets.sheet_file import SheetFacts
from errata.deploy.limits import MOST_CALLS
from errata.runtime.paired_change import PairedChange

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "sheet-format.md").read_text(encoding="utf-8")


def test_every_key_is_described_and_no_other() -> None:
    _, metadata = PAGE.split("## Metadata")
    rows = re.findall(r"^\| (`.+?`) \|", metadata, re.MULTILINE)
    told = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert told == {field.name for field in fields(SheetFacts)} | {"format", "sha256"}
    inner = {field.name for kind in (CallLevels, PairedChange) for field in fields(kind)}
    assert inner <= set(re.findall(r"`(\w+)`", metadata))


def test_tensors_and_limits_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| \((.+?)\) \|", PAGE, re.MULTILINE)
    assert {name: shape.replace(", ", "").rstrip(",") for name, _, shape in rows} == {
        name: sides for name, (_, sides) in sheet_file._TENSORS.items()
    }
    types = {"I64": "int64", "U8": "uint8", "F32": "float32"}
    assert all(types[kind] in str(sheet_file._TENSORS[name][0]) for name, kind, _ in rows)
    assert f"{sheet_file.LARGEST_SHEET:,} bytes" in PAGE
    assert f"of 1 to {2 * MOST_CALLS:,}" in PAGE
    assert f"of 1 to {sheet_file._MOST_CHANNELS}" in PAGE
    assert f"{sheet_file._LARGEST_NUMBER:,.0f} in magnitude" in PAGE
    assert sheet_file.FORMAT in PAGE
    assert f"`{sheet_file.METADATA}`" in PAGE
