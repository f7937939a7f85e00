"""Entries of a JSON file as dataclasses: every entry must be there, known, and of the declared type."""

import dataclasses
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

__all__ = ["build", "check_keys"]

_Kind = TypeVar("_Kind")


def build(kind: type[_Kind], content: Any, name: str) -> _Kind:
    """Return a dataclass from the JSON object that has exactly its fields, each of the declared type.

    Raises:
        ValueError: an entry is missing, unknown, or of another type.
    """
    fields = {field.name: field.type for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    check_keys(content, set(fields), name)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    for key, value in values.items():
        if not _fits(value, fields[key]):
            raise ValueError(f"`{key}` of {name} is {value!r}")
    return kind(**values)


def _fits(value: Any, declared: Any) -> bool:
    """Return whether a JSON value is of a field's declared type; looks at the outermost layer only."""
    options = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    kinds = {get_origin(option) or option for option in options}
    if float in kinds:
        kinds.add(int)
    return type(value) in kinds


def check_keys(content: Any, expected: set[str], name: str) -> None:
    """Check that a JSON object has exactly these entries.

    Raises:
        ValueError: it has not, or is no object.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{name} is {content!r}, not an object")
    if missing := sorted(expected - set(content)):
        raise ValueError(f"{name} is missing `{missing[0]}`")
    if unknown := sorted(set(content) - expected):
        raise ValueError(f"{name} has the unknown entry `{unknown[0]}`")
