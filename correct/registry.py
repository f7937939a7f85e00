"""The methods that plan files and the command line know by name.

A method joins with the decorator `register_method`. A name in a plan file is looked up here and never
imported, so opening somebody's plan runs none of their code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from errata.correct.corrector import Method
from errata.correct.traits import declared_traits
from errata.errors import PlanError

MethodClass = TypeVar("MethodClass", bound=type[Method])

_registered: dict[str, type[Method]] = {}
METHODS: Mapping[str, type[Method]] = MappingProxyType(_registered)
"""Registered methods by class name; errata's own are complete once `errata.correct` is imported."""


def register_method(kind: MethodClass) -> MethodClass:
    """Make a method known by its class name to plan files and, if it has defaults, to the command line.

    Use it as a decorator above `@dataclass(frozen=True, kw_only=True)`. The class is returned unchanged.
    Running the definition again, as in a notebook, replaces the earlier class.

    Raises:
        PlanError: the class is no dataclass, declares no traits, or another class has its name.
    """
    name = kind.__name__
    if not dataclasses.is_dataclass(kind):
        raise PlanError(f"{name} is not a dataclass; put @dataclass(frozen=True, kw_only=True) below")
    if not isinstance(getattr(kind, "traits", None), property) and declared_traits(kind) is None:
        raise PlanError(
            f"{name} does not say what it does; add to the class: traits = correct.Traits(…), with what "
            "holds of it, such as changes_prediction=True"
        )
    other = _registered.get(name)
    if other is not None and _place(other) != _place(kind):
        raise PlanError(f"there is a method {name!r} already, in {other.__module__}; give yours another name")
    _registered[name] = kind
    return kind


def method_from_json(stored: Any) -> Method | None:
    """Return the method that a plan file describes, or None for null.

    Raises:
        PlanError: its type is not registered, or the method refuses its part.
    """
    if stored is None:
        return None
    kind = stored.get("type") if isinstance(stored, Mapping) else None
    if not isinstance(kind, str) or kind not in METHODS:
        named = repr(stored if kind is None else kind)
        raise PlanError(
            f"unknown correction method {named}; known are {', '.join(sorted(METHODS))}. If it is a method "
            "of your own, import its module first"
        )
    return METHODS[kind].from_json(stored)


def _place(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
