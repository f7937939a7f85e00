"""Frozen dataclasses as plain JSON and back, read strictly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

from errata.errors import PlanError


class StoredDataclass:
    """Base of a frozen dataclass whose fields are plain JSON values.

    Attributes:
        VERSION: of its JSON; other versions are refused.
    """

    VERSION: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value with the keys `type` and `version`; `from_json` reads it back."""
        return {
            "type": type(self).__name__,
            "version": self.VERSION,
            **dataclasses.asdict(cast(Any, self)),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the instance that `to_json` described.

        Raises:
            PlanError: another type or version, a missing or unknown key, or a value that the class refuses.
        """
        return cls(**fields_of(cls, value, version=cls.VERSION))


def fields_of(kind: type, value: Mapping[str, Any], *, version: int) -> dict[str, Any]:
    """Return the keyword arguments of `kind` in `value`, without its `type` and `version`.

    Raises:
        PlanError: another type or version, a missing or unknown key.
    """
    name = kind.__name__
    if not isinstance(value, Mapping):
        raise PlanError(f"expected a {name} as a JSON object, got {value!r}")
    if value.get("type") != name:
        raise PlanError(f"expected type {name!r}, got {value.get('type')!r}")
    # In Python True and 1.0 equal 1.
    if type(value.get("version")) is not int or value["version"] != version:
        raise PlanError(
            f"{name} version {value.get('version')!r} is not supported; this release reads version {version}"
        )
    names = [field.name for field in dataclasses.fields(kind)]
    if missing := [key for key in names if key not in value]:
        raise PlanError(f"{name} has no key {missing[0]!r}; expected are {', '.join(names)}")
    if unknown := sorted(set(value) - set(names) - {"type", "version"}):
        raise PlanError(f"{name} has an unknown key {unknown[0]!r}; expected are {', '.join(names)}")
    return {key: value[key] for key in names}
