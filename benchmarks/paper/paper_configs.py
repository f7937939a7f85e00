"""Find the rows that a command line asks for: tables, rows of tables, and files and folders of a user's own.

A row was once a file in the folder of its table; these paths are still its name:

    benchmarks/paper/table1.yaml, benchmarks/paper/table1                all rows of a table
    benchmarks/paper/table1/cifar10-w8a8, …/table1/cifar10-w8a8.yaml     one row of it
    'benchmarks/paper/table1/cifar10-*'                                  the rows of it that match
    my-row.yaml, my-rows/                                                one row, a folder of such files
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from paper_files import load_row, read_mapping
from paper_rows import Row
from paper_table_file import load_table

from errata.errors import ReportError


@dataclass(frozen=True)
class Config:
    """What one argument of the command line stands for, or one match of a pattern.

    Attributes:
        title: its part of the name of the table that is written.
        rows: in the order in which they are listed.
    """

    title: str
    rows: Sequence[Row]


def load_rows(paths: Iterable[Path]) -> list[Row]:
    """Return the rows of `load_configs`, one after the other."""
    return [row for config in load_configs(paths) for row in config.rows]


def load_configs(paths: Iterable[Path]) -> list[Config]:
    """Return what the arguments stand for, in order.

    Raises:
        ErrataError: nothing is there, or a file is malformed.
    """
    return [config for path in paths for config in _configs_at(path)]


def _configs_at(path: Path) -> list[Config]:
    if path.is_dir():
        files = sorted(path.glob("*.yaml"), key=lambda file: _natural(file.stem))
        if not files:
            raise ReportError(
                f"`{path}` holds no .yaml file; give a table, a row of one, or a folder of files"
            )
        return [Config(path.resolve().name, [row for file in files for row in _of_file(file).rows])]
    if path.is_file():
        return [_of_file(path)]
    if tables := _files_at(f"{path}.yaml"):
        return list(map(_of_file, tables))
    tables = _files_at(f"{path.parent}.yaml")
    if not tables:
        raise ReportError(
            f"`{path}` does not exist; give a table (benchmarks/paper/table1.yaml), a row of a table "
            "(benchmarks/paper/table1/cifar10-w8a8), or a file or folder of your own rows"
        )
    return _matching(tables, path.name.removesuffix(".yaml"))


def _of_file(path: Path) -> Config:
    """Return the rows of a file: a table, sorted by name as a folder of files is, or one row."""
    content = read_mapping(path)
    if "rows" in content or "recipes" in content:
        return Config(path.stem, sorted(load_table(path), key=lambda row: _natural(row.name)))
    return Config(f"{path.resolve().parent.name}-{path.stem}", [load_row(path)])


def _files_at(pattern: str) -> list[Path]:
    """Return the file of that name, or the files that match it as a pattern."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    root = Path(Path(pattern).anchor or ".")
    return sorted(root.glob(str(Path(pattern).relative_to(root))))


def _matching(tables: Sequence[Path], pattern: str) -> list[Config]:
    """Return the rows of tables whose name is, or matches, `pattern`; each is a config."""
    rows = [(table.stem, row) for table in tables for row in _of_file(table).rows]
    if found := [
        Config(f"{title}-{row.name}", [row]) for title, row in rows if fnmatchcase(row.name, pattern)
    ]:
        return found
    names = [row.name for _, row in rows]
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    places = ", ".join(f"`{table}`" for table in tables)
    raise ReportError(f"no row {pattern!r} in {places}; the most similar rows there are {', '.join(near)}")


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts N = 3 before N = 10, and a row before the one that corrects it."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
