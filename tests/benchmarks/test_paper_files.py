"""Files of tables and of rows: what a command line may name, and what a malformed file is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.errors import PlanError, RecipeError, ReportError

PAPER = Path(__file__).parents[2] / "benchmarks" / "paper"
BASE = {
    "model": "M",
    "dataset": "D",
    "image_size": 8,
    "pipeline": "somewhere",
    "pipeline_class": "DDIMPipeline",
    "scheduler": {"class": "DDIMScheduler"},
    "steps": 10,
    "calibration": {"samples": 4, "batch_size": 2, "seed": 9},
    "samples": 6,
    "batch_size": 3,
    "reference": "real",
    "feature_network": "inception",
    "metrics": ["fid"],
}
ROW: dict[str, Any] = {"base": "base.yaml", "table": 1, "row": "W8A8", "recipe": "w8a8", "plan": None}
ROW["published"] = {"fid": "4.32"}
COLUMNS = ["name", "row", "recipe", "N", "iec", "fid"]
PLAIN = ["one", "W8A8", "w8a8", None, None, "4.30"]
TABLE: dict[str, Any] = {
    "table": 1,
    "recipes": {"w8a8": "w8a8", "cached": "deepcache-{N}"},
    "rows": {"small": [COLUMNS, PLAIN, ["two", "N=3 +IEC", "cached", 3, "full", "4.10"]]},
}
LoadRows = Callable[..., list[Any]]


@pytest.fixture
def load_rows(paper: dict[str, Any]) -> LoadRows:
    """Rows that the arguments of a command line stand for."""
    return lambda *paths: paper["paper_configs"].load_rows(paths)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"colour": 1},
            ReportError,
            "row.yaml`: unknown key 'colour', there or in its base; allowed are base, ambi",
        ),
        ({"published": {"sfid": "1"}}, ReportError, "row.yaml`: unknown metric 'sfid'; allowed are fid, is"),
        ({"recipe": "w3a8"}, RecipeError, "row.yaml`: unknown recipe 'w3a8'"),
        ({"recipe": None, "plan": {"method": "iec"}}, ReportError, "row.yaml`: it corrects the float model"),
        ({"plan": {"method": "magic"}}, ReportError, "row.yaml`: unknown method 'magic'; allowed are iec"),
        (
            {"plan": {"method": "iec", "steps": "some"}},
            PlanError,
            "row.yaml`: .*'some' is not a selection of steps",
        ),
        ({"plan": {"method": "iec", "size": 1}}, ReportError, "row.yaml`: iec has no such option: .*'size'"),
        ({"pipeline_class": "Other"}, ReportError, "pipeline_class is 'Other'; allowed are DDIMPipeline"),
        ({"clip": "somewhere"}, ReportError, "has a clip, but no prompts to score the images against"),
        ({"calibration": {"samples": 1}}, ReportError, r"calibration has \['samples'\]; it must have"),
        ({"table": None, "base": "missing.yaml"}, ReportError, "missing.yaml` cannot be read as YAML"),
    ],
)
def test_what_a_row_file_must_not_say(
    changes: dict[str, Any], error: type[Exception], message: str, load_rows: LoadRows, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(json.dumps(BASE))
    (tmp_path / "row.yaml").write_text(json.dumps(ROW | changes))
    with pytest.raises(error, match=message):
        load_rows(tmp_path / "row.yaml")


def test_an_incomplete_file_and_an_empty_folder_are_told(load_rows: LoadRows, tmp_path: Path) -> None:
    (tmp_path / "row.yaml").write_text(json.dumps({"table": 1}))
    with pytest.raises(
        ReportError, match="row.yaml` is incomplete: missing row, model.* add them there or in its base"
    ):
        load_rows(tmp_path / "row.yaml")
    (tmp_path / "row.yaml").write_text("- 1")
    with pytest.raises(ReportError, match="row.yaml` holds a list; it must hold keys and values"):
        load_rows(tmp_path / "row.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="holds no .yaml file"):
        load_rows(tmp_path / "empty")


def _write_table(root: Path, table: dict[str, Any]) -> Path:
    (root / "bases").mkdir()
    (root / "bases" / "small.yaml").write_text(json.dumps(BASE))
    (root / "mine.yaml").write_text(json.dumps(table))
    return root / "mine.yaml"


def _with_cell(column: str, value: Any) -> dict[str, Any]:
    """The first row with another value in one column."""
    cells = [value if name == column else cell for name, cell in zip(COLUMNS, PLAIN, strict=True)]
    return {"rows": {"small": [COLUMNS, cells]}}


def test_a_table_holds_the_rows_that_its_lines_spell(load_rows: LoadRows, tmp_path: Path) -> None:
    notes = {"ambiguous": {"cached": "Why {N}?"}, "unsupported": {"cached": {"part": "Not here."}}}
    plain, cached = load_rows(_write_table(tmp_path, TABLE | notes))
    assert (plain.name, plain.recipe, plain.plan, plain.ambiguous) == ("one", "w8a8", None, None)
    assert plain.unsupported == {}
    assert plain.published == {"fid": "4.30"}
    assert (cached.row, cached.recipe, cached.ambiguous) == ("N=3 +IEC", "deepcache-3", "Why 3?")
    assert cached.plan == {"method": "iec", "steps": "full"}
    assert cached.unsupported == {"part": "Not here."}
    assert {(row.table, row.model, row.samples) for row in (plain, cached)} == {(1, "M", 6)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"colour": 1}, ReportError, "unknown key 'colour'; allowed are table, recipes, ambiguous, unsupp"),
        ({"table": "one"}, ReportError, "table is 'one'; allowed are a whole number"),
        ({"recipes": ["w8a8"]}, ReportError, r"recipes is \['w8a8'\]; allowed are keys and values"),
        ({"recipes": {"w8a8": 8}}, ReportError, "recipes, w8a8 is 8; allowed are text"),
        ({"ambiguous": {"w4a8": "?"}}, ReportError, "ambiguous has 'w4a8'; allowed are .* w8a8, cached"),
        (
            {"unsupported": {"w8a8": "no"}},
            ReportError,
            "unsupported, w8a8 is 'no'; allowed are keys and reasons",
        ),
        (
            {"rows": {"large": [COLUMNS, PLAIN]}},
            ReportError,
            "large: unknown dataset; allowed are .*bases`: small",
        ),
        ({"rows": {"small": [COLUMNS]}}, ReportError, "small: it must be a list of lists: the columns, then"),
        (
            {"rows": {"small": [[*COLUMNS, "psnr"], PLAIN]}},
            ReportError,
            "unknown column 'psnr'; allowed are name",
        ),
        ({"rows": {"small": [[*COLUMNS, "N"], PLAIN]}}, ReportError, "2 columns are 'N'; keep one"),
        (
            {"rows": {"small": [COLUMNS[:-1], PLAIN]}},
            ReportError,
            "missing column 'fid'; needed are name, row",
        ),
        (
            {"rows": {"small": [COLUMNS, PLAIN[:-1]]}},
            ReportError,
            r"small, row 1 \(one\): 5 cells for 6 columns; the columns are name, row, recipe, N, iec, fid",
        ),
        ({"rows": {"small": [COLUMNS, PLAIN, PLAIN]}}, ReportError, "2 rows are named 'one'; give every row"),
        (_with_cell("name", 1), ReportError, r"row 1 \(1\): name is 1; allowed are text"),
        (
            _with_cell("recipe", "w3a8"),
            ReportError,
            r"row 1 \(one\): recipe is 'w3a8'; allowed are null, w8a8, ca",
        ),
        (_with_cell("recipe", "cached"), ReportError, "N is null, but the recipe is deepcache-{N}; give N"),
        (_with_cell("N", 3), ReportError, "N is 3, but the recipe is w8a8; leave N null"),
        (_with_cell("N", "3"), ReportError, "N is '3'; allowed are null or a whole number"),
        (_with_cell("iec", 1), ReportError, "iec is 1; allowed are null or an expression of steps"),
        (_with_cell("iec", "some"), PlanError, r"row 1 \(one\): .*'some' is not a selection of steps"),
        (_with_cell("fid", 4.3), ReportError, "fid is 4.3; allowed are null or the printed text in quotes"),
        ({"recipes": {"w8a8": "w3a8"}}, RecipeError, r"row 1 \(one\): unknown recipe 'w3a8'"),
    ],
)
def test_what_a_table_must_not_say(
    changes: dict[str, Any], error: type[Exception], message: str, load_rows: LoadRows, tmp_path: Path
) -> None:
    file = _write_table(tmp_path, TABLE | changes)
    with pytest.raises(error, match=f"^`.*mine.yaml`[:,] .*{message}"):
        load_rows(file)


@pytest.mark.parametrize("key", ["table", "recipes", "rows"])
def test_a_table_names_the_key_that_it_lacks(key: str, load_rows: LoadRows, tmp_path: Path) -> None:
    file = _write_table(tmp_path, {name: value for name, value in TABLE.items() if name != key})
    with pytest.raises(ReportError, match=f"mine.yaml`: missing key '{key}'; a table has table, recipes"):
        load_rows(file)


def test_a_malformed_table_stops_a_run_before_any_work(
    paper: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _write_table(tmp_path, TABLE | _with_cell("fid", 4.3))
    work = tmp_path / "work"
    assert paper["run"].main([str(PAPER / "table1.yaml"), str(file), "--work", str(work)]) == 1
    assert "mine.yaml`, small, row 1 (one): fid is 4.3" in capsys.readouterr().err
    assert not work.exists()


def test_rows_may_be_named_as_when_each_was_a_file(
    paper: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_configs = paper["paper_configs"].load_configs
    monkeypatch.chdir(PAPER.parent)
    named = [
        Path("paper/table2/cifar10-float.yaml"),
        Path("paper/table2/cifar10-float"),
        PAPER / "table2" / "cifar10-float.yaml",
    ]
    configs = load_configs(named)
    assert [config.title for config in configs] == ["table2-cifar10-float"] * 3
    assert {row.name for config in configs for row in config.rows} == {"cifar10-float"}
    whole = load_configs([Path("paper/table2"), Path("paper/table2.yaml"), PAPER / "table2"])
    assert [(config.title, len(config.rows)) for config in whole] == [("table2", 27)] * 3
    (everything,) = load_configs([Path("paper")])
    assert (everything.title, len(everything.rows)) == ("paper", 119)


def test_a_pattern_stands_for_the_rows_that_match(paper: dict[str, Any]) -> None:
    """A shell hands it on as it is, as there are no such files."""
    configs = paper["paper_configs"].load_configs([PAPER / "table?" / "bedrooms-w*-iec.yaml"])
    assert [config.title for config in configs] == [
        "table1-bedrooms-w8a8-iec",
        *(f"table3-bedrooms-w8a8-cachequant-{interval}-iec" for interval in (2, 3, 5, 10)),
    ]
    assert all(len(config.rows) == 1 for config in configs)


def test_what_is_not_there_is_told(load_rows: LoadRows, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"nowhere` does not exist; give a table \(.*table1.yaml\), a row"):
        load_rows(tmp_path / "nowhere")
    with pytest.raises(
        ReportError,
        match="no row 'cifar10-w8a8-ice' in `.*table1.yaml`; the most similar rows there are cifar10-w8a8-i",
    ):
        load_rows(PAPER / "table1" / "cifar10-w8a8-ice.yaml")


def test_rows_of_a_user_s_own_are_files_and_folders(paper: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (tmp_path / "base.yaml").write_text(json.dumps(BASE))
    for name in ("w8a8-10", "w8a8-9"):
        (folder / f"{name}.yaml").write_text(json.dumps(ROW | {"base": "../base.yaml"}))
    whole, one = paper["paper_configs"].load_configs([folder, folder / "w8a8-10.yaml"])
    assert (whole.title, [row.name for row in whole.rows]) == ("mine", ["w8a8-9", "w8a8-10"])
    assert (one.title, [row.name for row in one.rows]) == ("mine-w8a8-10", ["w8a8-10"])
