"""What a network does on the CPU in one call, written down while it does it.

Native operations report themselves (`native.call`). Of torch's operators the recorder follows views, copies
and concatenations, and those that need nothing but the inputs; whatever else reads what a kernel wrote, or is
read by one, makes the recording useless, with a reason.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from errata.deploy.cpu.instructions import Copy, Join, Operation, Range, Recorded, Varying
from errata.deploy.cpu.torch_part import TorchPart

_aten = torch.ops.aten
_here = threading.local()
_ALIGNMENT = 64  # bytes


@dataclass
class _Block:
    """A part of a chunk that was given out, and the storage of the tensor that lies there."""

    start: int
    end: int
    storage: torch.UntypedStorage
    pinned: list[Tensor] = field(default_factory=list)

    @property
    def is_free(self) -> bool:
        """Whether nothing else refers to it."""
        count: int = torch._C._storage_Use_Count(self.storage._cdata)  # type: ignore[attr-defined]
        return count == 1


class _Chunk:
    """Memory in one piece, parts of which are given out."""

    def __init__(self, size: int) -> None:
        self.memory = mmap.mmap(-1, size)
        self.blocks: list[_Block] = []  # in their order

    def gaps(self) -> Iterator[tuple[int, int]]:
        """Yield starts and ends of what is free."""
        ends = [0, *(block.end for block in self.blocks)]
        starts = [*(block.start for block in self.blocks), len(self.memory)]
        yield from ((end, start) for end, start in zip(ends, starts, strict=True) if end < start)


class Arena:
    """Memory that is given out again when nothing else refers to it."""

    def __init__(self, *, chunk: int = 32 << 20) -> None:
        self._chunk = chunk
        self._chunks: list[_Chunk] = []
        self._places: set[int] = set()
        self._most = 0

    @property
    def size(self) -> int:
        """Most bytes that were in use at once."""
        return self._most

    def has(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies here."""
        return tensor.untyped_storage().data_ptr() in self._places

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> Tensor:
        """Return a tensor of that shape, dense, in the smallest gap that is large enough."""
        with _disable_current_modes():
            layout = torch.empty(tuple(shape), dtype=dtype, device="meta").to(memory_format=memory_format)
            size = max(layout.numel() * dtype.itemsize, 1)
            block = self._block(size)
            return torch.empty(0, dtype=dtype).set_(block.storage, 0, layout.shape, layout.stride())

    def pin(self, tensor: Tensor, others: Iterable[Tensor]) -> None:
        """Keep others for as long as anything refers to the memory of a tensor."""
        place = tensor.untyped_storage().data_ptr()
        blocks = (block for chunk in self._chunks for block in chunk.blocks)
        next(block for block in blocks if block.storage.data_ptr() == place).pinned.extend(others)

    def _block(self, size: int) -> _Block:
        for chunk in self._chunks:
            # What a block pins is free one round later than the block.
            chunk.blocks = [block for block in chunk.blocks if not block.is_free]
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        gaps = [
            (end - start, number, start)
            for number, chunk in enumerate(self._chunks)
            for start, end in chunk.gaps()
            if end - start >= room
        ]
        if not gaps:
            self._chunks.append(_Chunk(max(room, self._chunk)))
            gaps = [(0, len(self._chunks) - 1, 0)]
        _, number, start = min(gaps)
        return self._given(self._chunks[number], start, start + room, size)

    def _given(self, chunk: _Chunk, start: int, end: int, size: int) -> _Block:
        storage = torch.frombuffer(
            chunk.memory, dtype=torch.uint8, offset=start, count=size
        ).untyped_storage()
        block = _Block(start, end, storage)
        chunk.blocks.append(block)
        chunk.blocks.sort(key=lambda block: block.start)
        self._places.add(storage.data_ptr())
        used = sum(block.end - block.start for chunk in self._chunks for block in chunk.blocks)
        self._most = max(self._most, used)
        return block


class Recorder(TorchDispatchMode):
    """Writes down what happens in its body.

    Args:
        inputs: what may differ from call to call besides the step.
        changing: tensors that differ from step to step, and are where they are.

    Attributes:
        arena: memory of whatever is computed.
        torch_part: what torch computes from the inputs alone.
        instructions: in their order.
        obstacle: why they are of no use; empty if they are.
    """

    def __init__(self, inputs: Iterable[Tensor], *, changing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        inputs = tuple(inputs)
        self.arena = Arena()
        self.torch_part = TorchPart((*inputs, *changing))
        self.instructions: list[Recorded] = []
        self.obstacle = ""
        self._inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        # What torch made: of what kernels wrote, kept so that its place is not used again; and of the inputs.
        self._foreign: dict[int, tuple[Tensor, str]] = {}
        self._computed: set[int] = set()
        self._declared: dict[int, Callable[[float], Tensor]] = {}

    def __enter__(self) -> Recorder:
        """Begin."""
        _here.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        """End."""
        super().__exit__(*problem)
        _here.recorder = None

    def declare(self, tensor: Tensor, at: Callable[[float], Tensor]) -> None:
        """Let instructions read a tensor that `at` returns for any time of a step."""
        self._declared[tensor.untyped_storage().data_ptr()] = at

    def address_of(self, tensor: Tensor, address: int) -> list[Varying]:
        """Return what varies at an address that holds the one of a tensor: nothing, unless it is declared."""
        at = self._declared.get(tensor.untyped_storage().data_ptr())
        return [] if at is None else [Varying(address, 8, lambda _, time: at(time).data_ptr())]

    def add(
        self,
        operation: Operation,
        arguments: ctypes.Structure,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        *,
        varying: Sequence[Varying] = (),
        kept: Sequence[Any] = (),
        join: Join | None = None,
    ) -> None:
        """Append an instruction that was carried out."""
        for tensor in reads:
            self._check(tensor, operation)
        for tensor in writes:
            if not self.arena.has(tensor):
                self.refuse(f"{operation.name.lower()} writes to memory of torch")
        constants = [tensor for tensor in reads if not self._is_own(tensor)]
        self.instructions.append(
            Recorded(
                operation,
                arguments,
                [Range.of(tensor) for tensor in reads],
                [Range.of(tensor) for tensor in writes],
                list(varying),
                [*kept, *constants],
                join,
            )
        )

    def _check(self, tensor: Tensor, operation: Operation) -> None:
        """See to it that a run finds what an operation reads."""
        place = tensor.untyped_storage().data_ptr()
        if self._is_own(tensor) or place in self._declared:
            return
        if self.torch_part.has(tensor) and place not in self._foreign:
            self.torch_part.want(tensor)
        elif place in self._foreign:
            self.refuse(f"{operation.name.lower()} reads what {self._foreign[place][1]} computed")
        elif place in self._computed:
            self.refuse(f"{operation.name.lower()} reads a tensor that was hidden from the recorder")

    def refuse(self, reason: str) -> None:
        """Note why the recording is of no use; the first reason stays."""
        self.obstacle = self.obstacle or reason

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out an operator of torch, or its native stand-in, and follow it."""
        given = dict(kwargs or {})
        if func is _aten.cat.default and (joined := self._joined(*args, **given)) is not None:
            return joined
        if func is _aten.clone.default and (copied := self._copied(*args, **given)) is not None:
            return copied
        result = func(*args, **given)
        self._follow(func, args, given, _tensors(result))
        return result

    def _follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: list[Tensor]
    ) -> None:
        reads = _tensors((args, kwargs))
        if any(map(self.arena.has, reads)):
            if func._schema.is_mutable or not results:
                self.refuse(f"{func} touches what a kernel wrote")
            for tensor in results:
                if not self.arena.has(tensor):
                    self._foreign[tensor.untyped_storage().data_ptr()] = (tensor, str(func))
        elif any(map(self._is_foreign, reads)):
            self._foreign |= {tensor.untyped_storage().data_ptr(): (tensor, str(func)) for tensor in results}
        elif any(map(self.torch_part.has, reads)):
            if not results:
                self.refuse(f"{func} looks at numbers")
            self.torch_part.add(func, args, kwargs, results)
            self._computed |= {tensor.untyped_storage().data_ptr() for tensor in results} - self._inputs

    def _is_foreign(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._foreign

    def _is_own(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._inputs or self.arena.has(tensor)

    def _joined(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
        """Return two images concatenated over channels by native copies, or None where they cannot be."""
        if len(tensors) != 2 or dim != 1 or not all(map(self._is_image, tensors)):
            return None
        first, second = tensors
        channels = (first.shape[1], second.shape[1])
        shape = (first.shape[0], sum(channels), *first.shape[2:])
        out = self.arena.empty(shape, torch.float32, torch.channels_last)
        self.arena.pin(out, tensors)
        join = Join((Range.of(first), Range.of(second)), channels, Range.of(out))
        for source, start in ((first, 0), (second, channels[0])):
            self.copy(source, out[:, start : start + source.shape[1]], join=join)
        return out

    def _copied(self, tensor: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor | None:
        """Return a native copy of an image, or of its first channels; None where it cannot be."""
        if memory_format is not torch.channels_last or not self._is_image(tensor):
            return None
        out = self.arena.empty(tensor.shape, torch.float32, torch.channels_last)
        self.copy(tensor, out)
        return out

    def copy(self, source: Tensor, target: Tensor, *, join: Join | None = None) -> None:
        """Copy images whose pixels lie at equal distances, natively."""
        with _disable_current_modes():
            target.copy_(source)
        rows, channels = source.numel() // source.shape[1], source.shape[1]
        steps = (source.stride(3) * 4, target.stride(3) * 4)
        arguments = Copy(source.data_ptr(), target.data_ptr(), rows, channels * 4, *steps)
        self.add(Operation.COPY, arguments, [source], [target], join=join)

    def _is_image(self, tensor: Tensor) -> bool:
        """Return whether it is an image whose channels lie together and whose pixels follow each other."""
        if tensor.ndim != 4 or tensor.dtype is not torch.float32 or not self._is_own(tensor):
            return False
        _, channels, height, width = tensor.shape
        pixel = tensor.stride(3)
        return pixel >= channels and tensor.stride() == (height * width * pixel, 1, width * pixel, pixel)


def active() -> Recorder | None:
    """Return the recorder of this thread, if one is recording."""
    recorder: Recorder | None = getattr(_here, "recorder", None)
    return recorder


def empty(
    shape: Sequence[int],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Return memory for what a kernel writes."""
    recorder = active()
    if recorder is None:
        return torch.empty(tuple(shape), dtype=dtype, memory_format=memory_format)
    return recorder.arena.empty(shape, dtype, memory_format)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
