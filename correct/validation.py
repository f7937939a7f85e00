"""Checks of a method's choices, with one form of message."""

from __future__ import annotations

from errata.errors import PlanError


def require(holds: bool, method: object, name: str, allowed: str) -> None:
    """Refuses the choice called `name` of `method` unless it holds.

    Raises:
        PlanError: naming the value and what is allowed.
    """
    if not holds:
        given = f"{type(method).__name__}({name}={getattr(method, name)!r})"
        raise PlanError(f"{given}: {name} must be {allowed}; leave it out for the default")


def is_number(value: object) -> bool:
    """Whether `value` is a real number that a float can hold; a truth value is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_count(value: object) -> bool:
    """Whether `value` is an integer; a truth value is not."""
    return isinstance(value, int) and not isinstance(value, bool)
