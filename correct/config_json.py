"""Reading a frozen dataclass of choices back from plain JSON, strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from errata.errors import PlanError


def fields_of(kind: type, value: Mapping[str, Any], *, version: int) -> dict[str, Any]:
    """The keyword arguments of `kind` in `value`, without its `type` and `version`.

    Raises:
        PlanError: another type or version, a missing or an unknown key.
    """
    name = kind.__name__
    if not isinstance(value, Mapping):
        raise PlanError(f"expected a {name} as a JSON object, got {value!r}")
    if value.get("type") != name:
        raise PlanError(f"expected type {name!r}, got {value.get('type')!r}")
    # In Python True and 1.0 equal 1.
    if type(value.get("version")) is not int or value["version"] != version:
        raise PlanError(
            f"{name} version {value.get('version')!r} is not one that this release reads; it reads {version}"
        )
    names = [field.name for field in dataclasses.fields(kind)]
    if missing := [key for key in names if key not in value]:
        raise PlanError(f"{name} lacks the key {missing[0]!r}; expected are {', '.join(names)}")
    if unknown := sorted(set(value) - set(names) - {"type", "version"}):
        raise PlanError(f"{name} has an unknown key {unknown[0]!r}; expected are {', '.join(names)}")
    return {key: value[key] for key in names}
