"""An emulated ARM CPU in place of this one: native calls and their memory go to a program under qemu."""

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from errata.deploy.cpu import attention_kernel, library, native
from errata.deploy.cpu.instructions import Operation, Range

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
MISSING = (
    "" if COMPILER and EMULATOR else "no gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user here"
)
# What qemu emulates, and the features of these CPUs in /proc/cpuinfo: no dot products; dot products; those of
# uint8 by int8 too.
FEATURES = {
    "cortex-a57": {"asimd"},
    "neoverse-n1": {"asimd", "asimddp"},
    "max": {"asimd", "asimddp", "i8mm", "bf16"},
}
PRODUCT, ATTENTION = -1, -2  # questions; see arm_calls.c
_THREADS = "2"


@dataclass
class Block:
    """Memory of a call: where it is here, and whether the call may write there."""

    place: Range
    is_written: bool

    @property
    def size(self) -> int:
        return self.place.end - self.place.start


def compiled(cpu: str, folder: Path) -> Path:
    """Return the program that calls the C code, compiled as on a machine with that CPU."""
    assert COMPILER is not None
    options = library.compile_options("aarch64", FEATURES[cpu])
    sources = [*library._SOURCES, Path(__file__).with_name("arm_calls.c")]
    program = folder / cpu
    jobs = []
    for source in sources:
        out = folder / f"{cpu}-{source.stem}.o"
        command = [COMPILER, *options, "-Wall", "-Wextra", "-Werror", "-c", str(source), "-o", str(out)]
        jobs.append((out, subprocess.Popen(command)))
    assert [job.wait() for _, job in jobs] == [0] * len(jobs)
    linked = [COMPILER, "-static", "-fopenmp", *(str(out) for out, _ in jobs), "-lm", "-o", str(program)]
    subprocess.run(linked, check=True)
    return program


class EmulatedCPU:
    """A running program with the C code of an ARM CPU."""

    def __init__(self, cpu: str, program: Path) -> None:
        assert EMULATOR is not None
        command = [EMULATOR, "-cpu", cpu, "-E", f"OMP_NUM_THREADS={_THREADS}", str(program)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(timeout=10) == 0

    def product_name(self) -> str:
        """Return how it multiplies integers; empty where it does not."""
        room = ctypes.create_string_buffer(64)
        return room.value.decode() if self._ask(PRODUCT, [_block(room, is_written=True)], []) else ""

    def attention_kinds(self) -> tuple[attention_kernel.AttentionKind, ...]:
        """Return the kinds that it has, the fastest first."""
        return tuple(kind for kind in attention_kernel.FASTEST_FIRST if self._ask(ATTENTION - kind, [], []))

    def call(
        self,
        operation: Operation,
        arguments: ctypes.Structure,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        *,
        varying: object = (),
        kept: Sequence[Any] = (),
    ) -> None:
        """Do what `native.call` does, there."""
        pointing = [_block(held) for held in (arguments, *_arrays_in(kept))]
        tensors = [Block(Range.of(x), is_written=False) for x in reads]
        tensors += [Block(Range.of(x), is_written=True) for x in writes]
        blocks = [*pointing, *_apart(tensors)]
        if self._ask(operation, blocks, list(_links(blocks, len(pointing)))):
            raise MemoryError(f"no memory for {operation.name.lower()}")

    def _ask(self, operation: int, blocks: Sequence[Block], links: Sequence[tuple[int, ...]]) -> int:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        before = [ctypes.string_at(block.place.start, block.size) for block in blocks]
        to.write(struct.pack("<3q", operation, len(blocks), len(links)))
        to.write(struct.pack(f"<{len(blocks)}q", *(block.size for block in blocks)))
        to.write(b"".join(before))
        to.write(b"".join(struct.pack("<4q", *link) for link in links))
        to.flush()
        answer = back.read(8)
        assert len(answer) == 8, f"the emulated CPU stopped with {self._process.wait()}"
        linked = {link[0] for link in links}
        for place, block in enumerate(blocks):
            after = back.read(block.size)
            if block.is_written:
                ctypes.memmove(block.place.start, after, block.size)
            else:
                assert place in linked or after == before[place], "it wrote where it only reads"
        return int(struct.unpack("<q", answer)[0])


@contextmanager
def instead(cpu: EmulatedCPU) -> Iterator[None]:
    """Have all native calls done there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "obstacle", lambda: "")
        patch.setattr(native, "product_obstacle", lambda: "")
        patch.setattr(native, "product_name", cpu.product_name)
        patch.setattr(native, "has_tiles", lambda: False)
        patch.setattr(native, "call", cpu.call)
        patch.setattr(attention_kernel, "attention_kinds", cpu.attention_kinds)
        yield


def _block(held: Any, *, is_written: bool = False) -> Block:
    start = ctypes.addressof(held)
    return Block(Range(start, start + ctypes.sizeof(held)), is_written)


def _arrays_in(kept: Iterable[Any]) -> Iterator[Any]:
    """Yield what C reads of things that are kept for it."""
    for thing in kept:
        held = [thing] if isinstance(thing, ctypes.Array | ctypes.Structure) else vars(thing).values()
        yield from (one for one in held if isinstance(one, ctypes.Array | ctypes.Structure))


def _apart(blocks: Iterable[Block]) -> list[Block]:
    """Return blocks that do not overlap: those that do become one."""
    found: list[Block] = []
    for block in sorted(blocks, key=lambda one: one.place.start):
        if found and block.place.start < found[-1].place.end:
            last = found[-1]
            end = max(last.place.end, block.place.end)
            found[-1] = Block(Range(last.place.start, end), last.is_written or block.is_written)
        elif block.size:
            found.append(block)
    return found


def _links(blocks: Sequence[Block], pointing: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield where the first `pointing` blocks hold addresses, and what of: block, offset, block, offset."""
    for place, block in enumerate(blocks[:pointing]):
        words = struct.unpack(
            f"<{block.size // 8}q", ctypes.string_at(block.place.start, block.size // 8 * 8)
        )
        for at, word in enumerate(words):
            for other, target in enumerate(blocks):
                if target.place.start <= word < target.place.end:
                    yield place, 8 * at, other, word - target.place.start
