"""What a block reads in one model and should answer according to another, spilled to disk row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from errata.compress.quantize.partial_forward import input_of, output_of
from errata.compress.rounding.blocks import Block
from errata.compress.rounding.row_store import RowStore
from errata.runtime.step_context import StepContext

# Runs a UNet on a batch whose rows are at these steps; see `recorded_inputs.MixedSteps`.
Evaluate = Callable[[nn.Module, Tensor, Mapping[str, Tensor]], object]
_ARGUMENT = "argument."
_TARGET = "target"
_STEP = "step"


@dataclass(frozen=True)
class BlockBatch:
    """Some rows: the block's arguments, what it should answer, and the step of each row `(B,)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    step: Tensor


class BlockData:
    """All captured rows of one block; see `capture_block`."""

    def __init__(self, store: RowStore, others: dict[str, Any], device: torch.device) -> None:
        self._store = store
        self._others = others
        self._device = device

    def __len__(self) -> int:
        return len(self._store)

    def read(self, rows: list[int]) -> BlockBatch:
        """Return those rows, on the block's device."""
        tensors = {name: tensor.to(self._device) for name, tensor in self._store.read(rows).items()}
        target, step = tensors.pop(_TARGET), tensors.pop(_STEP)
        arguments = {name.removeprefix(_ARGUMENT): value for name, value in tensors.items()} | self._others
        positions = sorted((name for name in arguments if name.isdigit()), key=int)
        args = tuple(arguments.pop(name) for name in positions)
        return BlockBatch(args, arguments, target, step)


@torch.no_grad()
def capture_block(
    block: Block,
    teacher: nn.Module,
    student: nn.Module,
    inputs: RowStore,
    evaluate: Evaluate,
    context: StepContext,
    store: RowStore,
    *,
    batch_size: int,
) -> BlockData:
    """Run both models on all of `inputs`, as far as the block, and keep what `BlockData` reads.

    Args:
        block: which.
        teacher: the float model; its answer is the target.
        student: the simulated model, earlier blocks learned; its block's arguments are kept.
        inputs: rows of denoiser inputs, with the `step` of each.
        evaluate: runs a model on a batch of `inputs`.
        context: of the student.
        store: empty; the caller closes it.
        batch_size: rows in memory at a time.

    Raises:
        TypeError: an argument of the block holds tensors inside another container.
    """
    others: dict[str, Any] = {}
    device = next(student.parameters()).device
    for first in range(0, len(inputs), batch_size):
        rows = list(range(first, min(first + batch_size, len(inputs))))
        batch = inputs.read(rows)
        step = batch[_STEP].to(device)
        target = output_of(teacher.get_submodule(block.name), partial(evaluate, teacher, step, batch))
        with context.at(step):
            args, kwargs = input_of(
                student.get_submodule(block.name), partial(evaluate, student, step, batch)
            )
        tensors, others = _sorted_arguments(block.name, args, kwargs)
        store.append({_TARGET: target, _STEP: step} | tensors, rows=len(rows))
    return BlockData(store, others, device)


def _sorted_arguments(
    block: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors, under names for the store, and everything else; positional ones go by their number."""
    arguments = {str(position): value for position, value in enumerate(args)} | dict(kwargs)
    tensors = {_ARGUMENT + name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in arguments.items() if not isinstance(value, Tensor)}
    for name, value in others.items():
        if _holds_tensors(value):
            raise TypeError(
                f"argument `{name}` of {block} holds tensors in a {type(value).__name__}; learned rounding "
                "takes tensors as arguments only: round to nearest, or leave the block out with "
                "modules_to_not_convert"
            )
    return tensors, others


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_tensors(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensors(item) for item in value)
    return isinstance(value, Tensor)
