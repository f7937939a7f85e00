"""JSON files of an artifact, read strictly and with bounds on memory and time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errata.canonical_json import loads_strict
from errata.deploy.limits import DEEPEST_JSON, LARGEST_SETTINGS, MOST_JSON_VALUES
from errata.errors import ArtifactCorruptError


def json_value(file: Path, *, largest: int = LARGEST_SETTINGS) -> Any:
    """Return the JSON value in a file of at most `largest` bytes.

    Raises:
        ArtifactCorruptError: it is larger, nested too deep, has a duplicate key or a number that is not
            finite, or is not JSON.
    """
    if (size := file.stat().st_size) > largest:
        raise ArtifactCorruptError(f"{file} has {size:,} bytes; JSON of this kind has at most {largest:,}")
    try:
        return bounded_json(file.read_bytes())
    except ValueError as error:
        raise ArtifactCorruptError(
            f"{file} is not valid JSON: {error}; it was not written by errata"
        ) from error


def json_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; diffusers would take a text for a path or a hub name, and fetch it.

    Raises:
        ArtifactCorruptError: as in `json_value`, or it holds something else.
    """
    value = json_value(file)
    if not isinstance(value, dict):
        raise ArtifactCorruptError(
            f"{file} holds a {type(value).__name__}, not an object; it was not written by errata"
        )
    return value


def bounded_json(data: bytes) -> Any:
    """Read strict JSON with a bounded number of values, nested at most `DEEPEST_JSON` deep.

    Raises:
        ValueError: saying what is wrong with it.
    """
    if (count := sum(data.count(sign) for sign in (b",", b"[", b"{"))) > MOST_JSON_VALUES:
        raise ValueError(f"about {count:,} values; allowed are {MOST_JSON_VALUES:,}")
    value = loads_strict(data)
    level, depth = [value], 0
    while level := [inner for item in level for inner in _inside(item)]:
        depth += 1
        if depth > DEEPEST_JSON:
            raise ValueError(f"nested more than {DEEPEST_JSON} deep")
    return value


def largest_whole_number(value: Any) -> int:
    """Return the largest magnitude among the whole numbers in a JSON value; 0 where there are none."""
    largest, level = 0, [value]
    while level:
        largest = max(largest, *(abs(item) for item in level if isinstance(item, int)), 0)
        level = [inner for item in level for inner in _inside(item)]
    return largest


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
