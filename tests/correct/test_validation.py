"""What counts as a number in a method's choices."""

from typing import Any

import pytest

from errata.correct import EpsilonScaling
from errata.correct.validation import is_number
from errata.errors import PlanError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, True),
        (-1.5, True),
        (10**300, True),
        (float("nan"), True),
        (10**400, False),
        (-(10**400), False),
        (True, False),
        ("1", False),
        (None, False),
    ],
    ids=lambda value: repr(value)[:8],
)
def test_numbers(value: Any, expected: bool) -> None:
    assert is_number(value) is expected


@pytest.mark.parametrize("name", ["scale", "slope"])
def test_an_integer_that_no_float_can_hold_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=f"EpsilonScaling.{name}=1000"):
        EpsilonScaling(**{name: 10**400})
