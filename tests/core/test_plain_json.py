"""Configurations survive the way through JSON."""

import math

import numpy as np
import pytest
import torch

from errata import canonical_json
from errata.plain_json import from_plain, to_plain


def test_a_configuration_comes_back_through_json() -> None:
    config = {
        "steps": 1000,
        "clip": False,
        "name": "é",
        "none": None,
        "lowest": -math.inf,
        "nested": {"beta": [0.1, math.inf]},
    }
    assert from_plain(canonical_json.loads_strict(canonical_json.dumps(to_plain(config)))) == config
    assert math.isnan(from_plain(to_plain(math.nan)))


def test_tuples_and_arrays_become_lists() -> None:
    config = {
        "shape": (1, 2),
        "betas": np.array([0.5, -np.inf]),
        "one": np.int64(3),
        "t": torch.tensor([1.5]),
    }
    assert from_plain(to_plain(config)) == {"shape": [1, 2], "betas": [0.5, -math.inf], "one": 3, "t": [1.5]}
    assert to_plain(torch.float16) == "torch.float16"


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match="is a object, which has no place in a configuration"):
        to_plain({"x": [object()]})
