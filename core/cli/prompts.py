"""Prompts for calibration, from a file or a dataset."""

from itertools import islice
from pathlib import Path

from errata.cli.usage import UsageError, read_text


def read_prompts(source: str, *, limit: int) -> list[str]:
    """The first `limit` prompts of a text file, one a line, or of `DATASET:COLUMN` on the hub."""
    if Path(source).is_file():
        lines = read_text(Path(source)).splitlines()
        prompts = [line.strip() for line in lines if line.strip()][:limit]
    else:
        prompts = _from_dataset(source, limit)
    if not prompts:
        raise UsageError(f"`{source}` holds no prompts")
    return prompts


def _from_dataset(source: str, limit: int) -> list[str]:
    name, _, column = source.rpartition(":")
    if not name or not column:
        raise UsageError(f"`{source}` is neither a text file nor DATASET:COLUMN")

    import datasets

    rows = datasets.load_dataset(name, split="train", streaming=True)
    first = list(islice(rows, limit))
    if first and column not in first[0]:
        raise UsageError(f"dataset `{name}` has no column `{column}`; it has {', '.join(sorted(first[0]))}")
    return [str(row[column]) for row in first]
