"""Checks of fields of methods, with one form of message, and of the arguments of the planner."""

from __future__ import annotations

import math

from errata.deploy import DeployedPipeline
from errata.errors import PlanError

# 500 %. More is a percentage taken for a fraction; the dearest useful plan runs each step a few times.
_LARGEST_BUDGET = 5.0


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


def check_plan_arguments(
    deployed: object, *, max_overhead: float, samples: int, batch_size: int, seed: int
) -> None:
    """Check that there is an artifact, and that each number is in range.

    Raises:
        TypeError: `deployed` is something else.
        PlanError: a number is out of range.
    """
    if not isinstance(deployed, DeployedPipeline):
        raise TypeError(
            f"plan() takes a loaded artifact, not a {type(deployed).__name__}: pass what deploy.load(path) "
            "returns"
        )
    is_budget = isinstance(max_overhead, int | float) and math.isfinite(max_overhead) and max_overhead >= 0
    if not is_budget:
        raise PlanError(
            f"max_overhead={max_overhead!r}: it must be a fraction of 0 or more, such as 0.15 for 15 %"
        )
    if max_overhead > _LARGEST_BUDGET:
        raise PlanError(
            f"max_overhead={max_overhead!r} would allow {max_overhead:.0%} more compute, and at most "
            f"{_LARGEST_BUDGET:.0%} makes sense; it is a fraction: write 0.15 for 15 %"
        )
    for name, value, least in (("samples", samples, 2), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise PlanError(f"{name}={value!r}: it must be at least {least}")
