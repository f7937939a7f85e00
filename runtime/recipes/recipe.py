"""Recipes: what to do to a model, as data: bits, rounding, cache.

A recipe has a short name, such as `w8a8` or `w4a8-learned+cachequant-5:corrected_by=iec`, unless it says what
only a file can say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import yaml

from errata.errors import RecipeError
from errata.runtime.recipes.caching import Cache, CacheQuant, DeepCache, cache_from_json
from errata.runtime.recipes.quantization import LearnedRounding, Quantization
from errata.runtime.schedule import CacheSchedule
from errata.runtime.weight_bits import is_weight_bits

__all__ = ["CacheQuant", "DeepCache", "LearnedRounding", "Quantization", "Recipe"]

_SCHEMA_VERSION = 2
_QUANTIZER = re.compile(r"w(\d)a(\d)(-learned)?")
_CACHE = re.compile(r"(deepcache|cachequant)(?:-(\d+))?")
_Reader = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Quantization, caching, or both; at least one.

    Attributes:
        quantization: what is quantized, and how.
        cache: which steps are full, and what the others reuse.
        calibrated_output: an affine map of each prediction takes up the mean error that quantization leaves
            in it, where that was measured to help; see `errata.runtime.output_map`. Without quantization
            there is nothing for it to take up.
    """

    quantization: Quantization | None = None
    cache: Cache | None = None
    calibrated_output: bool = True

    def __post_init__(self) -> None:
        if type(self.calibrated_output) is not bool:
            raise RecipeError(f"calibrated_output={self.calibrated_output!r}; allowed are true and false")
        if self.quantization is None and self.cache is None:
            raise RecipeError(f"the recipe is empty; name at least one of {grammar()}")

    @classmethod
    def named(cls, name: str) -> Recipe:
        """Parse a recipe name such as `"w4a8"` or `"w8a8+deepcache-10:branch=1"`.

        Raises:
            RecipeError: the name is not one of the grammar.
        """
        return cls(**parse(name))

    @property
    def name(self) -> str:
        """The name that `named` reads back; it ends in `*` where the recipe says more than a name can."""
        return spell(self)

    def allows(self, schedule: CacheSchedule) -> bool:
        """Return whether the schedule can come from this recipe."""
        if self.cache is None:
            return not schedule.has_cache  # then every step is full
        asked = self.cache.branch
        is_branch_right = schedule.branch >= 1 if asked is None else schedule.branch == asked
        return is_branch_right and self.cache.allows(schedule)

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value; `from_json` reads it back."""
        return {
            "type": "Recipe",
            "schema": _SCHEMA_VERSION,
            "quantization": None if self.quantization is None else self.quantization.to_json(),
            "cache": None if self.cache is None else self.cache.to_json(),
            "calibrated_output": self.calibrated_output,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """Read back what `to_json` wrote.

        A missing `calibrated_output` has its default, and so has a missing key in quantization and cache.

        Raises:
            RecipeError: an unknown or missing key, another type or schema version.
        """
        if value.get("type") != "Recipe" or value.get("schema") != _SCHEMA_VERSION:
            raise RecipeError(
                f"not a recipe of schema {_SCHEMA_VERSION}: "
                f"type={value.get('type')!r}, schema={value.get('schema')!r}"
            )
        fields = {key: item for key, item in value.items() if key not in ("type", "schema")}
        is_calibrated = fields.pop("calibrated_output", True)
        if odd := sorted(set(fields) ^ {"quantization", "cache"}):
            raise RecipeError(
                f"unknown or missing keys in the recipe: {odd}; a recipe has quantization, cache, "
                "calibrated_output"
            )
        quantization, cache = fields["quantization"], fields["cache"]
        try:
            return cls(
                calibrated_output=is_calibrated,
                quantization=None if quantization is None else Quantization.from_json(quantization),
                cache=None if cache is None else cache_from_json(cache),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise RecipeError(f"the recipe cannot be read: {error}") from error

    def to_yaml(self) -> str:
        """Return the same as `to_json`, as YAML text."""
        text: str = yaml.safe_dump(self.to_json(), sort_keys=False)
        return text

    @classmethod
    def from_text(cls, text: str) -> Recipe:
        """Read JSON or YAML text.

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


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text]


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):  # `int` would read `1_0` and spaces too
        raise ValueError(text)
    return int(text)


def _steps(text: str) -> tuple[int, ...]:
    return tuple(_whole(step) for step in text.split("/"))


_READERS: Mapping[str, _Reader] = {
    "iterations": _whole, "samples": _whole, "batch_size": _whole, "seed": _whole,
    "learning_rate": float, "scale_learning_rate": float,
    "bias_correction": _boolean, "equalization": _boolean, "calibrated_output": _boolean,
    "branch": _whole, "spacing": str, "center": float, "power": float, "steps": _steps,
    "search": str, "correction": _boolean, "gain": str, "corrected_by": str,
}  # fmt: skip
# What to write, by reader.
_KINDS: Mapping[_Reader, str] = {
    _whole: "a whole number", float: "a number", _boolean: "true or false", str: "a word",
    _steps: "step numbers such as 0/4/9",
}  # fmt: skip


def parse(name: str) -> dict[str, Any]:
    """Return the choices that a name stands for, as arguments of a `Recipe`.

    Raises:
        RecipeError: the name is not one of the grammar, or an option has no use or no sense.
    """
    body, colon, text = name.partition(":")
    options = _options(name, text.split(",") if colon else [])
    is_calibrated = options.pop("calibrated_output", True)
    quantization: Quantization | None = None
    cache: Cache | None = None
    for part in body.split("+"):
        if (match := _quantizer(name, part)) and quantization is None:
            quantization = _quantization(int(match[1]), match[3] is not None, options)
        elif (match := _CACHE.fullmatch(part)) and cache is None:
            cache = _cache(match[1], match[2], options)
        else:
            raise RecipeError(f"unknown recipe {name!r}: cannot read {part!r}; allowed are {grammar()}")
    if options:
        unused = next(iter(options))
        raise RecipeError(
            f"recipe {name!r}: option {unused!r} does not apply: {_where(unused)}; leave it out"
        )
    return {"quantization": quantization, "cache": cache, "calibrated_output": is_calibrated}


def grammar() -> str:
    """Return what a recipe name may be, as text."""
    from errata.runtime.weight_formats import weight_bits  # with torch, which no known recipe needs

    quantizers = [f"w{bits}a8" for bits in weight_bits()]
    learned = [f"{name}-learned" for name in quantizers]
    return (
        f"{', '.join(quantizers + learned)}, deepcache-N, deepcache:steps=0/4/9, cachequant-N, or a "
        "quantizer and a cache joined by '+', then options after a colon, as in "
        "w4a8-learned+deepcache-5:iterations=500,branch=1"
    )


def _quantizer(name: str, part: str) -> re.Match[str] | None:
    """Return the widths in a part of a name, if it is a quantizer with a known weight format.

    Raises:
        RecipeError: it asks for activations of other widths than 8 bits.
    """
    match = _QUANTIZER.fullmatch(part)
    if match is None or not is_weight_bits(int(match[1])):
        return None
    if match[2] != "8":
        raise RecipeError(
            f"unknown recipe {name!r}: activations have 8 bits in every recipe, because the int8 kernels and "
            f"the artifact format read 8-bit activation codes; use {part.replace('a' + match[2], 'a8')}"
        )
    return match


def spell(recipe: Recipe) -> str:
    """Return the shortest name of these choices; a `*` at the end stands for what only a file can say."""
    quantization, cache = recipe.quantization, recipe.cache
    parts, options = [], dict[str, Any]()
    if quantization is not None:
        learned = "-learned" if quantization.rounding is not None else ""
        parts.append(f"w{quantization.weight_bits}a{quantization.activation_bits}{learned}")
        if quantization.rounding is not None:
            options |= _changed(quantization.rounding)
        options |= _changed(quantization, "bias_correction", "equalization")
    if cache is not None:
        parts.append(cache.method if cache.interval is None else f"{cache.method}-{cache.interval}")
        options |= _changed(cache)
    options |= _changed(recipe, "calibrated_output")
    says_more = quantization is not None and bool(quantization.patterns)
    tail = ",".join(f"{key}={_text(value)}" for key, value in options.items())
    return "+".join(parts) + (f":{tail}" if tail else "") + ("*" if says_more else "")


def _options(name: str, items: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in items:
        key, _, value = item.partition("=")
        if key in options:
            raise RecipeError(f"recipe {name!r} gives option {key!r} twice; leave one of them out")
        if key not in _READERS:
            raise RecipeError(
                f"recipe {name!r}: unknown option {item!r}; allowed are {', '.join(_READERS)}, each as "
                "NAME=VALUE"
            )
        try:
            options[key] = _READERS[key](value)
        except (KeyError, ValueError) as error:
            raise RecipeError(
                f"recipe {name!r}: cannot read {item!r}; {key} takes {_KINDS[_READERS[key]]}"
            ) from error
    return options


def _quantization(weight_bits: int, is_learned: bool, options: dict[str, Any]) -> Quantization:
    rounding = LearnedRounding(**_taken(options, LearnedRounding)) if is_learned else None
    chosen = {key: options.pop(key) for key in ("bias_correction", "equalization") if key in options}
    return Quantization(weight_bits=weight_bits, activation_bits=8, rounding=rounding, **chosen)


def _cache(method: str, interval: str | None, options: dict[str, Any]) -> Cache:
    every = None if interval is None else int(interval)
    if method == DeepCache.method:
        return DeepCache(interval=every, **_taken(options, DeepCache))
    if every is None:
        raise RecipeError("cachequant needs an interval, as in cachequant-5")
    return CacheQuant(interval=every, **_taken(options, CacheQuant))


def _taken(options: dict[str, Any], config: type) -> dict[str, Any]:
    """Take the fields of a dataclass out of the options."""
    names = {field.name for field in fields(config)} - {"interval"}
    return {key: options.pop(key) for key in list(options) if key in names}


def _changed(config: Any, *only: str) -> dict[str, Any]:
    """Return the options of a dataclass that differ from their defaults."""
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name in (only or _READERS)
        and field.default is not MISSING
        and getattr(config, field.name) != field.default
    }


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _where(option: str) -> str:
    names = {
        "w4a8-learned": LearnedRounding, "w4a8": Quantization, "deepcache-N": DeepCache,
        "cachequant-N": CacheQuant,
    }  # fmt: skip
    homes = [name for name, config in names.items() if option in {field.name for field in fields(config)}]
    return f"it belongs to {' or '.join(homes)}"
