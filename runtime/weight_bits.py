"""Bits of a weight, and what is stored for them, without torch as long as errata's own formats are meant.

Other numbers of bits are those of the registry, `errata.runtime.weight_formats`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.runtime.bit_strings import bit_string_fault, int8_fault, packed_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Of the formats int8, int6 and int4; tests compare what is said here of them with the registry.
OWN_BITS = (8, 6, 4)
_BYTE = 8


def is_weight_bits(bits: object) -> bool:
    """Return whether there is a weight format of that many bits."""
    if type(bits) is int and bits in OWN_BITS:
        return True
    from errata.runtime import weight_formats

    return weight_formats.is_weight_bits(bits)


def allowed_weight_bits() -> str:
    """Return the bits of all formats as text, such as `4, 6 and 8`."""
    from errata.runtime import weight_formats

    return weight_formats.allowed_weight_bits()


def stored_type(bits: int, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Return type, as in the header of a safetensors file, and shape of the stored codes of a weight.

    Raises:
        ValueError: there is no format of that many bits.
    """
    if bits == _BYTE:
        return "I8", tuple(shape)
    if bits in OWN_BITS:
        return "U8", (packed_bytes(math.prod(shape), bits=bits),)
    import torch

    from errata.runtime.weight_formats import weight_format

    found = weight_format(bits)
    return "I8" if found.dtype is torch.int8 else "U8", found.stored_shape(shape)


def fault_of(stored: NDArray[np.generic], count: int, *, bits: int) -> str:
    """Return what is wrong with the stored codes of a weight of `count` numbers; empty if nothing is."""
    if bits == _BYTE:
        return int8_fault(stored)
    if bits in OWN_BITS:
        return bit_string_fault(stored, count, bits=bits)
    import torch

    from errata.runtime.weight_formats import weight_format

    return weight_format(bits).fault(torch.from_numpy(stored.copy()), count)
