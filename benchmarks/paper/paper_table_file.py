"""Read the file of one table of the paper: shared settings first, then one line for each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_files import make_row, read_mapping
from paper_rows import METRICS, Row

from errata.errors import ReportError

KEYS = {"table": int, "recipes": dict, "ambiguous": dict, "unsupported": dict, "rows": dict}
"""Keys of a file, and the type of each; `ambiguous` and `unsupported` may be left out."""
COLUMNS = ("name", "row", "recipe", "N", "iec", *METRICS)
NEEDED_COLUMNS = ("name", "row", "recipe", "iec", "fid")


@dataclass(frozen=True)
class TableFile:
    """What the rows of one file share.

    Attributes:
        path: of the file.
        table: number in the paper.
        recipes: name of a `compress.Recipe` by key; `{N}` stands for the row's N.
        ambiguous: what the printed table does not make clear, by key of `recipes`.
        unsupported: what the toolkit cannot do, with the reason, by key of `recipes`.
        rows: by dataset: the columns, then one line of cells for each row.
    """

    path: Path
    table: int
    recipes: Mapping[str, str]
    ambiguous: Mapping[str, str]
    unsupported: Mapping[str, Mapping[str, str]]
    rows: Mapping[str, Sequence[Sequence[Any]]]

    @classmethod
    def of(cls, path: Path) -> TableFile:
        """Return the content of a file, with its shared settings checked.

        Raises:
            ReportError: an unknown or missing key, a value of the wrong type, or a note on an unknown recipe.
        """
        content = {"ambiguous": {}, "unsupported": {}, **read_mapping(path)}
        _check_shared(content, f"`{path}`")
        return cls(path, **content)

    def row_of(self, base: Mapping[str, Any], cells: Mapping[str, Any], place: str) -> Row:
        """Return one row: its cells by column, over the settings of its dataset."""
        key, number, steps = cells["recipe"], cells.get("N"), cells["iec"]
        recipe = None if key is None else self.recipes[key]
        if ("{N}" in (recipe or "")) != (number is not None):
            told = "N is null" if number is None else f"N is {number}"
            wanted = "give N" if number is None else "leave N null"
            raise ReportError(f"{place}: {told}, but the recipe is {recipe}; {wanted}")
        ambiguous = self.ambiguous.get(key)
        own = {
            "name": cells["name"],
            "table": self.table,
            "row": cells["row"],
            "recipe": recipe and recipe.replace("{N}", str(number)),
            "plan": None if steps is None else {"method": "iec", "steps": steps},
            "published": {metric: cells[metric] for metric in METRICS if metric in cells},
            "ambiguous": ambiguous and ambiguous.replace("{N}", str(number)),
            "unsupported": self.unsupported.get(key, {}),
        }
        return make_row(base, own, place=place)


def load_table(path: Path) -> list[Row]:
    """Return the rows of a table's file, in the order of the file.

    Raises:
        ErrataError: the file is malformed; the message names file, row, key and what is allowed.
    """
    table = TableFile.of(path)
    rows = [row for dataset in table.rows for row in _rows_of(table, dataset)]
    for name, count in Counter(row.name for row in rows).items():
        if count > 1:
            raise ReportError(f"`{path}`: {count} rows are named {name!r}; give every row a name of its own")
    return rows


def _rows_of(table: TableFile, dataset: str) -> list[Row]:
    """Return the rows of one dataset, whose settings are in `bases/DATASET.yaml` beside the table."""
    place, lines = f"`{table.path}`, {dataset}", table.rows[dataset]
    if not isinstance(lines, list) or len(lines) < 2 or not all(isinstance(line, list) for line in lines):
        raise ReportError(f"{place}: it must be a list of lists: the columns, then the cells of each row")
    base = _base_of(table.path.parent / "bases", dataset, place)
    columns, *lines = lines
    _check_columns(columns, place)
    rows = []
    for number, line in enumerate(lines, 1):
        place_of_row = f"{place}, row {number} ({line[0] if line else 'empty'})"
        if len(line) != len(columns):
            counts = f"{len(line)} cells for {len(columns)} columns"
            raise ReportError(f"{place_of_row}: {counts}; the columns are {', '.join(columns)}")
        cells = dict(zip(columns, line, strict=True))
        for column, cell in cells.items():
            _check_cell(column, cell, table, place_of_row)
        rows.append(table.row_of(base, cells, place_of_row))
    return rows


def _base_of(bases: Path, dataset: str, place: str) -> dict[str, Any]:
    if not (bases / f"{dataset}.yaml").is_file():
        known = ", ".join(sorted(file.stem for file in bases.glob("*.yaml"))) or "none"
        raise ReportError(f"{place}: unknown dataset; allowed are the files in `{bases}`: {known}")
    return read_mapping(bases / f"{dataset}.yaml")


def _check_shared(content: Mapping[str, Any], place: str) -> None:
    """Refuse a file whose keys, or the values of what its rows share, are not those of a table."""
    if unknown := sorted(map(str, content.keys() - KEYS)):
        raise ReportError(f"{place}: unknown key {unknown[0]!r}; allowed are {', '.join(KEYS)}")
    for key, kind in KEYS.items():
        if key not in content:
            raise ReportError(f"{place}: missing key {key!r}; a table has {', '.join(KEYS)}")
        if type(content[key]) is not kind:
            allowed = "a whole number" if kind is int else "keys and values"
            raise ReportError(f"{place}: {key} is {content[key]!r}; allowed are {allowed}")
    for key, kind in (("recipes", str), ("ambiguous", str), ("unsupported", dict)):
        for name, value in content[key].items():
            if name not in content["recipes"]:
                known = ", ".join(content["recipes"])
                raise ReportError(
                    f"{place}: {key} has {name!r}; allowed are the recipes of this file, {known}"
                )
            if not isinstance(value, kind):
                allowed = "text" if kind is str else "keys and reasons"
                raise ReportError(f"{place}: {key}, {name} is {value!r}; allowed are {allowed}")


def _check_columns(columns: Sequence[Any], place: str) -> None:
    for column, count in Counter(map(str, columns)).items():
        if column not in COLUMNS:
            raise ReportError(f"{place}: unknown column {column!r}; allowed are {', '.join(COLUMNS)}")
        if count > 1:
            raise ReportError(f"{place}: {count} columns are {column!r}; keep one")
    if missing := [column for column in NEEDED_COLUMNS if column not in columns]:
        raise ReportError(f"{place}: missing column {missing[0]!r}; needed are {', '.join(NEEDED_COLUMNS)}")


def _check_cell(column: str, cell: Any, table: TableFile, place: str) -> None:
    """Refuse a cell that its column cannot hold, such as a printed number without its quotes."""
    is_text = isinstance(cell, str)
    if column in ("name", "row"):
        is_allowed, allowed = is_text, "text"
    elif column == "recipe":
        is_allowed = cell is None or (is_text and cell in table.recipes)
        allowed = f"null, {', '.join(table.recipes)}"
    elif column == "N":
        is_allowed, allowed = cell is None or type(cell) is int, "null or a whole number"
    elif column == "iec":
        is_allowed, allowed = cell is None or is_text, "null or an expression of steps, such as all or full"
    else:
        is_allowed, allowed = cell is None or is_text, "null or the printed text in quotes"
    if not is_allowed:
        raise ReportError(f"{place}: {column} is {cell!r}; allowed are {allowed}")
