"""Arguments survive the way into a flat mapping and back."""

from typing import Any

import pytest
import torch

from errata import CalibrationError, calibration
from errata.runtime.conditioning import flatten

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


def test_nested_arguments_come_back() -> None:
    arguments = {
        "words": A,
        "added": {"embeds": B, "ids": C},
        "residuals": (A, B, C),
        "deep": {"x": {"y": (A,)}},
    }
    flat = flatten(arguments)
    assert list(flat) == [
        "words",
        "added.embeds",
        "added.ids",
        "residuals.0",
        "residuals.1",
        "residuals.2",
        "deep.x.y.0",
    ]
    assert calibration.nest(flat) == arguments
    assert calibration.nest({}) == {}


def test_a_long_list_comes_back_in_order() -> None:
    values = tuple(torch.tensor(float(i)) for i in range(12))
    assert calibration.nest(dict(sorted(flatten({"list": values}).items()))) == {"list": values}


def test_nothing_is_recorded_for_nothing() -> None:
    assert flatten({"mask": None, "added": {}, "residuals": (), "more": {"mask": None}}) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"cross_attention_kwargs": {"scale": 0.5}},
            "`cross_attention_kwargs.scale` is 0.5, a float; only tensors",
        ),
        ({"flag": False}, "`flag` is False, a bool"),
        ({"added": {"a.b": A}}, "`added` has the key 'a.b'"),
        ({"added": {"0": A}}, "`added` has the key '0'"),
        ({"added": {7: A}}, "`added` has the key 7"),
    ],
)
def test_what_cannot_be_recorded_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        flatten(arguments)
