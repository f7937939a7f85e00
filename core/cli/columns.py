"""Prompts and labels for calibration: a column of a dataset, or the lines of a file."""

from itertools import islice
from pathlib import Path
from typing import Any

from errata.cli.usage import UsageError, read_text
from errata.errors import first_line

# How `datasets` calls its readers of local files.
_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_ALLOWED = "a text file, FILE:COLUMN of a .parquet, .csv, .json or .jsonl file, or DATASET:COLUMN on the hub"


def read_prompts(source: str, *, limit: int) -> list[str]:
    """The first `limit` prompts of a text file, one a line, or of a column of a file or hub dataset.

    Raises:
        UsageError: nothing is there to read, or a row holds no text.
    """
    prompts: list[str] = []
    for value in _read(source, limit):
        if not isinstance(value, str):
            raise UsageError(f"`{source}` holds {value!r}, which is no text; choose another column")
        prompts.append(value)
    return prompts


def read_labels(source: str, *, limit: int) -> list[int]:
    """The first `limit` class labels, whole numbers, of the same sources.

    Raises:
        UsageError: nothing is there to read, or a row holds no whole number.
    """
    labels: list[int] = []
    for value in _read(source, limit):
        is_number = type(value) is int or (isinstance(value, str) and value.isdecimal())
        if not is_number:
            raise UsageError(f"`{source}` holds {value!r}, which is no class label; choose another column")
        labels.append(int(value))
    return labels


def _read(source: str, limit: int) -> list[Any]:
    path = Path(source)
    if path.is_file() and path.suffix not in _READERS:
        lines = read_text(path).splitlines()
        values: list[Any] = [line.strip() for line in lines if line.strip()][:limit]
    else:
        values = _column(source, limit)
    if not values:
        raise UsageError(f"`{source}` is empty; give a file or dataset with at least one row")
    return values


def _column(source: str, limit: int) -> list[Any]:
    name, _, column = source.rpartition(":")
    if not name or not column:
        hint = " (the column is missing)" if Path(source).is_file() else ""
        raise UsageError(f"`{source}` cannot be read{hint}; allowed are {_ALLOWED}")

    import datasets

    reader = _READERS.get(Path(name).suffix)
    try:
        if reader is not None:
            if not Path(name).is_file():
                raise FileNotFoundError(f"there is no file {name}")
            rows = datasets.load_dataset(reader, data_files=name, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(name, split="train", streaming=True)
        first = list(islice(rows, limit))
    except Exception as problem:  # datasets, its readers and the hub raise whatever they like
        reason = first_line(problem)
        raise UsageError(f"`{source}` cannot be read: {reason}; allowed are {_ALLOWED}") from problem
    if first and column not in first[0]:
        raise UsageError(f"`{name}` has no column `{column}`; it has {', '.join(sorted(first[0]))}")
    return [row[column] for row in first]
