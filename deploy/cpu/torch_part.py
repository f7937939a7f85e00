"""The part of a recorded call that torch computes: small things that follow from the inputs alone.

Networks that embed more than the time, class labels or pooled prompts, project that embedding in every
residual block. It is a few numbers a sample, and a program takes them from torch before it runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor that differs from run to run."""

    number: int


@dataclass(frozen=True)
class _Operation:
    function: Any
    args: Any
    kwargs: Any
    results: tuple[int, ...]
    needs: frozenset[int]


class TorchPart:
    """Operators of torch on inputs, and on what follows from them.

    Args:
        inputs: what differs from run to run; a run finds it in the same memory.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        self._slots = WeakIdKeyDictionary()
        self._inputs: dict[int, Tensor] = {}
        self._operations: list[_Operation] = []
        self._wanted: dict[int, Tensor] = {}
        self._count = 0
        for tensor in inputs:
            self._inputs[self._new(tensor)] = tensor

    def has(self, tensor: Tensor) -> bool:
        """Return whether a tensor is an input or follows from one."""
        return tensor in self._slots

    def add(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Tensor]
    ) -> None:
        """Append an operator that was carried out."""
        needs: set[int] = set()

        def slot(tensor: Tensor) -> Tensor | _Slot:
            if tensor not in self._slots:
                return tensor  # a constant
            needs.add(self._slots[tensor])
            return _Slot(self._slots[tensor])

        given, named = tree_map_only(Tensor, slot, (tuple(args), dict(kwargs)))
        numbers = tuple(self._slots[x] if x in self._slots else self._new(x) for x in results)
        self._operations.append(_Operation(function, given, named, numbers, frozenset(needs)))

    def want(self, tensor: Tensor) -> None:
        """Let every run write what a tensor is then to its memory."""
        self._wanted[self._slots[tensor]] = tensor

    def finish(self) -> None:
        """Leave out what nothing wants."""
        needed, kept = set(self._wanted), []
        for operation in reversed(self._operations):
            if needed & set(operation.results):
                needed |= operation.needs
                kept.append(operation)
        self._operations = kept[::-1]

    def run(self) -> None:
        """Compute what is wanted."""
        if not self._wanted:
            return
        known: dict[int, Tensor] = dict(self._inputs)

        def value(slot: _Slot) -> Tensor:
            return known[slot.number]

        for operation in self._operations:
            args, kwargs = tree_map_only(_Slot, value, (operation.args, operation.kwargs))
            made = operation.function(*args, **kwargs)
            results = made if isinstance(made, tuple | list) else (made,)
            known |= zip(operation.results, results, strict=True)
        for number, tensor in self._wanted.items():
            tensor.copy_(known[number])

    def _new(self, tensor: Tensor) -> int:
        self._slots[tensor] = self._count
        self._count += 1
        return self._count - 1
