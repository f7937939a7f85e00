"""What to do to a model: bits, rounding, cache; written down, not done."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from errata.compress.schedule import CacheSchedule
from errata.errors import RecipeError

_SCHEMA_VERSION = 1
_DEFAULT_BRANCH = 3  # DeepCache's CIFAR-10 setting: the last 3 blocks
_QUANTIZERS = {"w8a8": (8, 8), "w4a8": (4, 8)}
_PLANNED = ("w4a8-learned", "cachequant")
_GRAMMAR = "w8a8, w4a8, deepcache-N or a quantizer and a cache joined by '+', as in w8a8+deepcache-5:branch=3"


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Bits of weights and activations; conv_in, conv_out and the time embedding keep 8-bit weights."""

    weight_bits: int
    activation_bits: int

    def __post_init__(self) -> None:
        if self.weight_bits not in (4, 8):
            raise RecipeError(f"weight_bits={self.weight_bits} is not supported; allowed are 4 and 8")
        if self.activation_bits != 8:
            raise RecipeError(f"activation_bits={self.activation_bits} is not supported; allowed is 8")


@dataclass(frozen=True, kw_only=True)
class DeepCache:
    """Uniform feature caching: every `interval`-th step is full, the others recompute `branch` resnets.

    `branch=None` stands for the paper's CIFAR-10 setting, the last 3 resnets (or all that there are).
    """

    interval: int
    branch: int | None = None

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise RecipeError(f"the cache interval must be a whole number, at least 1, got {self.interval!r}")
        if self.branch is not None and (type(self.branch) is not int or self.branch < 1):
            raise RecipeError(f"branch={self.branch!r}: a cached step must recompute at least 1 resnet")

    def schedule(self, num_steps: int, *, max_branch: int) -> CacheSchedule:
        """The schedule for a run of `num_steps` on a UNet whose last up block has `max_branch` resnets.

        Raises:
            RecipeError: `branch` is larger than the block.
        """
        branch = min(_DEFAULT_BRANCH, max_branch) if self.branch is None else self.branch
        if branch > max_branch:
            raise RecipeError(
                f"branch={branch}, but the last up block has {max_branch} resnets; "
                f"allowed are 1 to {max_branch}"
            )
        return CacheSchedule.uniform(num_steps, interval=self.interval, branch=branch)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Quantization, caching, or both; at least one."""

    quantization: Quantization | None = None
    cache: DeepCache | None = None

    def __post_init__(self) -> None:
        if self.quantization is None and self.cache is None:
            raise RecipeError(f"the recipe is empty; name at least one of {_GRAMMAR}")

    @classmethod
    def named(cls, name: str) -> Recipe:
        """Parses a recipe name such as `"w4a8"` or `"w8a8+deepcache-10:branch=1"`.

        Raises:
            RecipeError: the name is not one of the grammar.
        """
        body, _, options = name.partition(":")
        quantization: Quantization | None = None
        cache: DeepCache | None = None
        for part in body.split("+"):
            interval = re.fullmatch(r"deepcache-(\d+)", part)
            if part in _QUANTIZERS and quantization is None:
                weight_bits, activation_bits = _QUANTIZERS[part]
                quantization = Quantization(weight_bits=weight_bits, activation_bits=activation_bits)
            elif interval and cache is None:
                cache = DeepCache(interval=int(interval[1]), branch=_branch(name, options))
            else:
                raise _unknown(name, part)
        if options and cache is None:
            raise RecipeError(
                f"recipe {name!r}: {options!r} needs a cache; write for example w8a8+deepcache-5:{options}"
            )
        return cls(quantization=quantization, cache=cache)

    @property
    def name(self) -> str:
        """The name that `named` reads back."""
        parts = []
        if self.quantization is not None:
            parts.append(f"w{self.quantization.weight_bits}a{self.quantization.activation_bits}")
        if self.cache is not None:
            branch = "" if self.cache.branch is None else f":branch={self.cache.branch}"
            parts.append(f"deepcache-{self.cache.interval}{branch}")
        return "+".join(parts)

    def schedule(self, num_steps: int, *, max_branch: int) -> CacheSchedule:
        """Which steps are full, for a run of `num_steps`."""
        if self.cache is None:
            return CacheSchedule.uncached(num_steps)
        return self.cache.schedule(num_steps, max_branch=max_branch)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value; `from_json` reads it back."""
        return {"type": "Recipe", "schema": _SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_json`, strict.

        Raises:
            RecipeError: an unknown or missing key, another type or schema version.
        """
        if value.get("type") != "Recipe" or value.get("schema") != _SCHEMA_VERSION:
            raise RecipeError(
                f"not a recipe of schema {_SCHEMA_VERSION}: "
                f"type={value.get('type')!r}, schema={value.get('schema')!r}"
            )
        try:
            fields = {key: item for key, item in value.items() if key not in ("type", "schema")}
            quantization, cache = fields.pop("quantization"), fields.pop("cache")
            if fields:
                raise RecipeError(
                    f"unknown keys in the recipe: {sorted(fields)}; allowed are quantization, cache"
                )
            return cls(
                quantization=None if quantization is None else Quantization(**quantization),
                cache=None if cache is None else DeepCache(**cache),
            )
        except (KeyError, TypeError) as error:
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


def _branch(name: str, options: str) -> int | None:
    if not options:
        return None
    match = re.fullmatch(r"branch=(\d+)", options)
    if match is None:
        raise RecipeError(f"recipe {name!r}: cannot read option {options!r}; allowed is branch=NUMBER")
    return int(match[1])


def _unknown(name: str, part: str) -> RecipeError:
    if part.startswith(_PLANNED):
        return RecipeError(f"recipe {name!r}: {part!r} is not part of this version; allowed are {_GRAMMAR}")
    return RecipeError(f"unknown recipe {name!r}: cannot read {part!r}; allowed are {_GRAMMAR}")
