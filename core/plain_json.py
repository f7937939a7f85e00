"""Configurations as plain JSON. Diffusers' own hold tuples, arrays and infinities, which JSON does not."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["from_plain", "to_plain"]

# How a number that JSON has no word for is spelled: {"$float": "-inf"}.
_NOT_FINITE = "$float"


def to_plain(value: Any) -> Any:
    """Return the JSON value for a configuration value: tuples and arrays as lists, mappings as objects.

    Raises:
        TypeError: the value has no place in a configuration.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {_NOT_FINITE: str(value)}
        case Mapping():
            return {str(key): to_plain(item) for key, item in value.items()}
        case list() | tuple():
            return [to_plain(item) for item in value]
    return _numbers_as_plain(value)


def _numbers_as_plain(value: Any) -> Any:
    """Return the JSON value for an array, a tensor or a type of torch; reading JSON needs neither library."""
    import numpy as np
    import torch

    match value:
        case np.ndarray() | np.generic() | torch.Tensor():
            return to_plain(value.tolist())
        case torch.dtype():
            return str(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}, which has no place in a configuration")


def from_plain(value: Any) -> Any:
    """Undo `to_plain`, but for tuples and arrays, which stay lists."""
    match value:
        case {"$float": str(text)} if len(value) == 1:
            return float(text)
        case dict():
            return {key: from_plain(item) for key, item in value.items()}
        case list():
            return [from_plain(item) for item in value]
    return value
