"""A recorded call as a program that runs by one native call, at any step.

The program does what the recording did, in the same order and with the same numbers, but for two things: what
normalizations read of two concatenated images is read from the two, and products that are added up are one
operation. Both leave every result as it was, to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from errata.deploy.cpu.arguments import NormQuantize
from errata.deploy.cpu.instructions import Copy, Join, Operation, Range, Recorded
from errata.deploy.cpu.library import library
from errata.deploy.cpu.recording import Arena, Recorder
from errata.deploy.cpu.torch_part import TorchPart


class _Instruction(ctypes.Structure):
    """As in `operations.h`."""

    _fields_ = [("operation", ctypes.c_int64), ("arguments", ctypes.c_void_p)]


class _Patch(ctypes.Structure):
    """As in `operations.h`."""

    _fields_ = [("address", ctypes.c_void_p), ("value", ctypes.c_uint64), ("bytes", ctypes.c_int64)]


class Program:
    """What a recorder wrote down, ready to run.

    Args:
        recorder: without an obstacle.
        inputs: memory that a run fills with what it is given.
        outputs: what the recorded call returned.
    """

    def __init__(self, recorder: Recorder, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._arena: Arena = recorder.arena
        self._torch_part: TorchPart = recorder.torch_part
        self._torch_part.finish()
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._instructions = with_sums(without_joins(recorder.instructions))
        self._varying = [varying for item in self._instructions for varying in item.varying]
        self._code = (_Instruction * len(self._instructions))(
            *(_Instruction(item.operation, ctypes.addressof(item.arguments)) for item in self._instructions)
        )
        self._patches: dict[tuple[int, float], ctypes.Array[_Patch]] = {}

    def __len__(self) -> int:
        """Return the number of its instructions."""
        return len(self._instructions)

    @property
    def memory(self) -> int:
        """Bytes of all that it computes, outputs included."""
        return self._arena.size

    def knows(self, step: int, time: float) -> bool:
        """Return whether it has run at a step and its time."""
        return (step, time) in self._patches

    def run(self, inputs: Sequence[Tensor], step: int, time: float) -> tuple[Tensor, ...]:
        """Return the outputs, the caller's to keep, for inputs of the recorded shapes at a step and its time.

        Raises:
            MemoryError: there is too little.
        """
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        self._torch_part.run()
        patches = self._patches_of(step, time)
        if library().errata_run(self._code, len(self._code), patches, len(patches)):
            raise MemoryError("no memory for what an operation needs besides its output")
        return tuple(output.clone() for output in self._outputs)

    def _patches_of(self, step: int, time: float) -> ctypes.Array[_Patch]:
        if (step, time) not in self._patches:
            self._patches[step, time] = (_Patch * len(self._varying))(
                *(
                    _Patch(varying.address, varying.value(step, time), varying.size)
                    for varying in self._varying
                )
            )
        return self._patches[step, time]


def without_joins(instructions: Sequence[Recorded]) -> list[Recorded]:
    """Return the instructions without concatenations whose readers can read the two images themselves."""
    kept = list(instructions)
    joins = {id(item.join): item.join for item in kept if item.join is not None}
    for join in joins.values():
        readers = _readers_of(kept, join)
        if readers is not None:
            for reader in readers:
                _read_both(reader, join)
            kept = [item for item in kept if item.join is not join]
    return kept


def _readers_of(instructions: Sequence[Recorded], join: Join) -> list[Recorded] | None:
    """Return what reads a concatenation; None if it has to be made."""
    start = max(place for place, item in enumerate(instructions) if item.join is join) + 1
    readers: list[Recorded] = []
    is_changed = False  # whether a source is no more what it was
    for item in instructions[start:]:
        if any(join.out.overlaps(read) for read in item.reads):
            if is_changed or not _can_read_both(item, join):
                return None
            readers.append(item)
        if any(source.overlaps(write) for source in join.sources for write in item.writes):
            is_changed = True
        if any(join.out.overlaps(write) for write in item.writes):  # the memory is used again
            break
    return readers


def _can_read_both(item: Recorded, join: Join) -> bool:
    if any(source.overlaps(write) for source in join.sources for write in item.writes):
        return False
    arguments = item.arguments
    if isinstance(arguments, NormQuantize):
        return bool(arguments.sources[0] == join.out.start and arguments.channels[0] == sum(join.channels))
    width = join.channels[0] * 4
    return (
        isinstance(arguments, Copy)
        and arguments.source == join.out.start
        and arguments.bytes <= width
        and arguments.source_step == sum(join.channels) * 4
    )


def _read_both(item: Recorded, join: Join) -> None:
    arguments = item.arguments
    if isinstance(arguments, NormQuantize):
        arguments.sources[:] = [source.start for source in join.sources]
        arguments.channels[:] = join.channels
    else:
        assert isinstance(arguments, Copy)
        arguments.source, arguments.source_step = join.sources[0].start, join.channels[0] * 4
    own = [read for read in item.reads if not join.out.overlaps(read)]
    item.reads = [*own, *join.sources]


def with_sums(instructions: Sequence[Recorded]) -> list[Recorded]:
    """Return the instructions with products that are added to others computed along with these."""
    kept: list[Recorded] = list(instructions)
    for place, item in enumerate(instructions):
        first = _added_alone(instructions, place) if _is_product(item) else None
        if first is None:
            continue
        item.arguments.before, item.arguments.added = ctypes.addressof(first.arguments), None
        (made,) = first.writes
        item.reads = [*(read for read in item.reads if not made.overlaps(read)), *first.reads]
        item.varying = [*first.varying, *item.varying]
        item.kept.append(first)
        kept.remove(first)
    return kept


def _is_product(item: Recorded) -> bool:
    return item.operation is Operation.INT8_PRODUCT


def _added_alone(instructions: Sequence[Recorded], place: int) -> Recorded | None:
    """Return the product that the one at a place adds; None if something else needs it, or it cannot wait."""
    item = instructions[place]
    made = [
        (earlier, other)
        for earlier, other in enumerate(instructions[:place])
        if any(write.start <= (item.arguments.added or 0) < write.end for write in other.writes)
    ]
    if not made:
        return None
    earlier, first = made[-1]
    if not (_is_product(first) and first.arguments.out == item.arguments.added):
        return None
    if not library().errata_tiles_add(ctypes.byref(first.arguments), ctypes.byref(item.arguments)):
        return None
    (out,) = first.writes
    between = instructions[earlier + 1 : place]
    changes = any(
        write.overlaps(read) for other in (*between, item) for write in other.writes for read in first.reads
    )
    is_needed = any(out.overlaps(read) for other in between for read in other.reads)
    return None if changes or is_needed or _is_read_later(instructions[place + 1 :], out, item) else first


def _is_read_later(instructions: Sequence[Recorded], out: Range, item: Recorded) -> bool:
    """Return whether anything reads what was at `out`, before it is written again."""
    written = list(item.writes)
    for other in instructions:
        for read in other.reads:
            is_new = any(write.start <= read.start and read.end <= write.end for write in written)
            if out.overlaps(read) and not is_new:
                return True
        written += [write for write in other.writes if out.overlaps(write)]
    return False
