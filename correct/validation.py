"""Checks of a method's fields, with one form of message."""

from __future__ import annotations

from errata.errors import PlanError


class FieldError(PlanError):
    """A field of a method has a value that is not allowed.

    Attributes:
        field: its name.
        allowed: what it must be, in words.
    """

    def __init__(self, method: object, field: str, allowed: str) -> None:
        given = f"{type(method).__name__}({field}={getattr(method, field)!r})"
        super().__init__(f"{given}: {field} must be {allowed}; leave it out for the default")
        self.field, self.allowed = field, allowed


def require(holds: bool, method: object, name: str, allowed: str) -> None:
    """Check that a condition on the field `name` of `method` holds.

    Raises:
        FieldError: it does not; the message has the value and what is allowed.
    """
    if not holds:
        raise FieldError(method, name, allowed)


def is_number(value: object) -> bool:
    """Return whether `value` is a real number that a float can hold; a truth value is not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_count(value: object) -> bool:
    """Return whether `value` is an integer; a truth value is not."""
    return isinstance(value, int) and not isinstance(value, bool)
