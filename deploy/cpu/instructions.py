"""What a program of native operations is made of, as Python sees it."""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


class Operation(enum.IntEnum):
    """As in `operations.h`."""

    INT8_PRODUCT = 0
    NORM_QUANTIZE = 1
    LAYER_NORM_QUANTIZE = 2
    ATTENTION = 3
    QUANTIZE = 4
    UPSAMPLE = 5
    COPY = 6
    ADJUST = 7


@dataclass(frozen=True)
class Range:
    """Bytes from `start` up to `end`."""

    start: int
    end: int

    @classmethod
    def of(cls, tensor: Tensor) -> Range:
        """Return all bytes between the first and the last one of a tensor."""
        start = tensor.data_ptr()
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        last = sum((size - 1) * stride for size, stride in sizes) if tensor.numel() else -1
        return cls(start, start + (last + 1) * tensor.element_size())

    def overlaps(self, other: Range) -> bool:
        """Return whether both have a byte in common."""
        return self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class Varying:
    """Bytes of an instruction's arguments that depend on the step.

    Attributes:
        address: of the first.
        size: 4 or 8.
        value: returns them, as an integer, for a step and its time.
    """

    address: int
    size: int
    value: Callable[[int, float], int]


@dataclass
class Join:
    """A concatenation of two tensors over channels, which two instructions copy."""

    sources: tuple[Range, Range]
    channels: tuple[int, int]
    out: Range


@dataclass(eq=False)
class Recorded:
    """An instruction.

    Attributes:
        operation: what it does.
        arguments: as C reads them.
        reads: memory of other instructions, inputs and constants that it reads.
        writes: memory that it writes.
        varying: what depends on the step.
        kept: whatever has to stay in memory with it.
        join: of which it is a part.
    """

    operation: Operation
    arguments: ctypes.Structure
    reads: list[Range]
    writes: list[Range]
    varying: list[Varying] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)
    join: Join | None = None


class Copy(ctypes.Structure):
    """Arguments of `Operation.COPY`, as in the C source."""

    _fields_ = [
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "bytes", "source_step", "target_step")),
    ]
