"""Codes of a fixed number of bits, one after another: how many bytes, and which are valid. Without torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BYTE = 8
_OUTSIDE = "holds a code outside the symmetric range"


def packed_bytes(count: int, *, bits: int) -> int:
    """Return how many bytes `count` codes take as a string of bits."""
    return -(-count * bits // _BYTE)


def group_sizes(bits: int) -> tuple[int, int]:
    """Return how many codes fill whole bytes, and how many bytes."""
    whole = math.lcm(bits, _BYTE)
    return whole // bits, whole // _BYTE


def int8_fault(stored: NDArray[np.generic]) -> str:
    """Return what is wrong with codes of 8 bits."""
    return _OUTSIDE if bool((stored == -128).any()) else ""


def bit_string_fault(stored: NDArray[np.generic], count: int, *, bits: int) -> str:
    """Return what is wrong with codes that follow each other as a string of bits, `(bytes,)` uint8."""
    left_over = _BYTE * len(stored) - bits * count
    if left_over and int(stored[-1]) >> (_BYTE - left_over):
        return "does not fill its last byte up with 0"
    size, group_bytes = group_sizes(bits)
    groups = np.pad(stored.view(np.uint8), (0, -len(stored) % group_bytes)).reshape(-1, group_bytes)
    for code in range(size):
        byte, start = divmod(bits * code, _BYTE)
        found = groups[:, byte] >> start
        if start + bits > _BYTE:
            found = found | (groups[:, byte + 1] << (_BYTE - start))
        if bool(((found & (2**bits - 1)) == 2 ** (bits - 1)).any()):
            return _OUTSIDE
    return ""
