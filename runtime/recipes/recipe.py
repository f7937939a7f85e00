"""What to do to a model: bits, rounding, cache; written down, not done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from errata.errors import RecipeError
from errata.runtime.recipes.caching import Cache, CacheQuant, DeepCache, cache_from_json
from errata.runtime.recipes.quantization import LearnedRounding, Quantization
from errata.runtime.recipes.recipe_name import GRAMMAR, parse, spell
from errata.runtime.schedule import CacheSchedule

__all__ = ["CacheQuant", "DeepCache", "LearnedRounding", "Quantization", "Recipe"]

_SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Quantization, caching, or both; at least one."""

    quantization: Quantization | None = None
    cache: Cache | None = None

    def __post_init__(self) -> None:
        if self.quantization is None and self.cache is None:
            raise RecipeError(f"the recipe is empty; name at least one of {GRAMMAR}")

    @classmethod
    def named(cls, name: str) -> Recipe:
        """Parses a recipe name such as `"w4a8"` or `"w8a8+deepcache-10:branch=1"`.

        Raises:
            RecipeError: the name is not one of the grammar.
        """
        quantization, cache = parse(name)
        return cls(quantization=quantization, cache=cache)

    @property
    def name(self) -> str:
        """The name that `named` reads back; it ends in `*` where the recipe says more than a name can."""
        return spell(self.quantization, self.cache)

    def allows(self, schedule: CacheSchedule) -> bool:
        """Whether the schedule can come from this recipe."""
        if self.cache is None:
            return not schedule.has_cache  # then every step is full
        asked = self.cache.branch
        is_branch_right = schedule.branch >= 1 if asked is None else schedule.branch == asked
        return is_branch_right and self.cache.allows(schedule)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; `from_json` reads it back."""
        return {
            "type": "Recipe",
            "schema": _SCHEMA_VERSION,
            "quantization": None if self.quantization is None else self.quantization.to_json(),
            "cache": None if self.cache is None else self.cache.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_json`, strict; inside quantization and cache a missing key has its default.

        Raises:
            RecipeError: an unknown or missing key, another type or schema version.
        """
        if value.get("type") != "Recipe" or value.get("schema") != _SCHEMA_VERSION:
            raise RecipeError(
                f"not a recipe of schema {_SCHEMA_VERSION}: "
                f"type={value.get('type')!r}, schema={value.get('schema')!r}"
            )
        fields = {key: item for key, item in value.items() if key not in ("type", "schema")}
        if odd := sorted(set(fields) ^ {"quantization", "cache"}):
            raise RecipeError(
                f"unknown or missing keys in the recipe: {odd}; a recipe has quantization, cache"
            )
        quantization, cache = fields["quantization"], fields["cache"]
        try:
            return cls(
                quantization=None if quantization is None else Quantization.from_json(quantization),
                cache=None if cache is None else cache_from_json(cache),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise RecipeError(f"the recipe cannot be read: {error}") from error

    def to_yaml(self) -> str:
        """The same as `to_json`, as YAML text."""
        text: str = yaml.safe_dump(self.to_json(), sort_keys=False)
        return text

    @classmethod
    def from_text(cls, text: str) -> Recipe:
        """Reads JSON or YAML text.

        Raises:
            RecipeError: not a mapping, or not a recipe.
        """
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            try:
                value = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise RecipeError(f"the recipe is neither JSON nor YAML: {error}") from error
        if not isinstance(value, dict):
            raise RecipeError(f"a recipe is a mapping, got {type(value).__name__}")
        return cls.from_json(value)
