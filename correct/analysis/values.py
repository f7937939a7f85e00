"""A number for every step and sample, with its mean and range."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from errata.errors import PlanError


@dataclass(frozen=True)
class Values:
    """`each[i][j]` is the number of step i (in the order of the steps measured) and sample j."""

    each: tuple[tuple[float, ...], ...]

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean over the samples, one for each step."""
        return tuple(statistics.fmean(row) for row in self.each)

    @property
    def low(self) -> tuple[float, ...]:
        """The smallest number of each step."""
        return tuple(map(min, self.each))

    @property
    def high(self) -> tuple[float, ...]:
        """The largest number of each step."""
        return tuple(map(max, self.each))

    def to_json(self) -> list[list[float]]:
        """Return `each` as lists."""
        return [list(row) for row in self.each]


def require_whole(name: str, value: int, *, least: int = 1) -> None:
    """Check a count that a caller gave.

    Raises:
        PlanError: it is not an integer, or below `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanError(f"{name}={value!r}: {name} must be an integer, {least} or more")
