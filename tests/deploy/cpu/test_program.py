"""What a recording may change about what it recorded: nothing that shows."""

import ctypes
import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from errata.deploy.cpu import int8, native, recording
from errata.deploy.cpu.instructions import Operation, Range, Recorded
from errata.deploy.cpu.int8 import StepTable
from errata.deploy.cpu.program import Program, with_sums, without_joins
from errata.deploy.cpu.recording import Arena, Recorder
from errata.deploy.cpu.vnni import VNNIProduct
from errata.runtime.layers import Geometry
from errata.runtime.step_context import StepContext

pytestmark = [
    pytest.mark.skipif(not int8.is_available(), reason="this CPU has no VNNI instructions"),
    pytest.mark.skipif(bool(native.product_obstacle()), reason=native.product_obstacle() or "there is none"),
]
needs_tiles = pytest.mark.skipif(not native.has_tiles(), reason="this CPU has no AMX")
SCALES, ZERO_POINTS = torch.tensor([0.02, 0.05]), torch.tensor([100, 140], dtype=torch.uint8)


@pytest.fixture
def context() -> StepContext:
    return StepContext()


@pytest.fixture
def table(context: StepContext) -> StepTable:
    return StepTable(SCALES, ZERO_POINTS, context)


def image(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(memory_format=torch.channels_last)


def product(outputs: int, inputs: int, kernel: int, *, seed: int = 0) -> VNNIProduct:
    draw = torch.Generator().manual_seed(seed)
    shape = (outputs, inputs, kernel, kernel)
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, generator=draw)
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return VNNIProduct(Geometry(convolution), codes, torch.rand(outputs, generator=draw) * 0.01)


def multiplied(of: VNNIProduct, codes: Tensor, table: StepTable, added: Tensor | None = None) -> Tensor:
    return of(codes, table.now(), None, added, torch.float32)


def operations(recorder: Recorder) -> list[Operation]:
    return [item.operation for item in recorder.instructions]


def check(program: Program, x: Tensor, context: StepContext, call: Any) -> None:
    """At both steps the program does what the call does, and at the other step something else."""
    wanted = []
    for step in (0, 1):
        with context.at(step, time=0.0):
            wanted.append(call(x))
    for step in (0, 1):
        (found,) = program.run([x], step, 0.0)
        assert torch.equal(found, wanted[step])
        assert not torch.equal(found, wanted[1 - step])


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (5, 7), (4, 4), (1, 16), (16, 3)])
@needs_tiles
def test_products_that_are_added_up_are_one(
    size: tuple[int, int], context: StepContext, table: StepTable
) -> None:
    layers = [product(48, 64, 3, seed=1), product(48, 128, 1, seed=2), product(48, 64, 3, seed=3)]
    x = image(2, 256, *size)

    def call(x: Tensor) -> Tensor:
        parts = [native.quantize(part, table.now()) for part in x.split([64, 128, 64], dim=1)]
        total = None
        for layer, codes in zip(layers, parts, strict=True):
            total = multiplied(layer, codes, table, total)
        assert total is not None
        return total

    with context.at(0, time=0.0), Recorder([x]) as recorder:
        output = call(x)
    assert recorder.obstacle == ""
    assert len(with_sums(recorder.instructions)) == 4  # three quantizers and a product
    check(Program(recorder, [x], [output]), image(2, 256, *size, seed=9), context, call)


@needs_tiles
def test_a_sum_that_is_needed_by_itself_is_written(context: StepContext, table: StepTable) -> None:
    first, second = product(64, 64, 3, seed=1), product(64, 64, 3, seed=2)
    x = image(1, 64, 8, 8)

    def call(x: Tensor) -> Tensor:
        codes = native.quantize(x, table.now())
        inner = multiplied(first, codes, table)
        total = multiplied(second, codes, table, inner)
        return multiplied(first, native.quantize(inner, table.now()), table, total)

    with context.at(0, time=0.0), Recorder([x]) as recorder:
        output = call(x)
    # The first is quantized, too; the second, which adds it from memory, cannot be a part of the third.
    assert len(recorder.instructions) == 5
    assert len(with_sums(recorder.instructions)) == 5
    check(Program(recorder, [x], [output]), image(1, 64, 8, 8, seed=9), context, call)


def test_normalizations_read_both_of_two_images(context: StepContext, table: StepTable) -> None:
    norm = nn.GroupNorm(4, 40)
    x = image(2, 24, 6, 6)

    def call(x: Tensor) -> Tensor:
        other = multiplied(product(16, 24, 3, seed=3), native.quantize(x, table.now()), table)
        both = torch.cat([x, other], dim=1)
        (codes, rest), _ = native.norm_quantize(both, norm, [table.now()] * 2, [20, 20], silu=True)
        kept = both[:, :8].clone(memory_format=torch.channels_last)
        last = multiplied(product(8, 20, 1, seed=4), codes, table, kept)
        return multiplied(product(8, 20, 1, seed=5), rest, table, last)

    with context.at(0, time=0.0), Recorder([x]) as recorder:
        output = call(x)
    assert operations(recorder).count(Operation.COPY) == 3
    assert sum(item.operation is Operation.COPY for item in without_joins(recorder.instructions)) == 1
    check(Program(recorder, [x], [output]), image(2, 24, 6, 6, seed=9), context, call)


def test_two_images_that_something_else_reads_are_joined(context: StepContext, table: StepTable) -> None:
    x = image(2, 16, 6, 6)

    def call(x: Tensor) -> Tensor:
        other = multiplied(product(16, 16, 3, seed=3), native.quantize(x, table.now()), table)
        both = torch.cat([x, other], dim=1)
        return multiplied(product(8, 32, 1, seed=4), native.quantize(both, table.now()), table)

    with context.at(0, time=0.0), Recorder([x]) as recorder:
        output = call(x)
    assert len(without_joins(recorder.instructions)) == len(recorder.instructions)
    check(Program(recorder, [x], [output]), image(2, 16, 6, 6, seed=9), context, call)


class Place(ctypes.Structure):
    """Arguments that say nothing."""


def made(reads: list[Range], writes: list[Range]) -> Recorded:
    return Recorded(Operation.QUANTIZE, Place(), reads, writes)


@needs_tiles
@pytest.mark.parametrize(
    ("between", "sums"),
    [
        ("nothing", True),
        ("reads the sum", False),
        ("overwrites what the first product reads", False),
        ("overwrites a part of it", False),
        ("reads the sum later", False),
        ("reads its memory when it is written again", True),
        ("reads its memory when a part is written again", False),
    ],
)
def test_products_are_added_up_only_where_nothing_changes(between: str, sums: bool) -> None:
    codes, weights = torch.zeros(1, 64, 4, 4, dtype=torch.uint8), product(64, 64, 1)
    codes = codes.to(memory_format=torch.channels_last)
    with StepContext().at(0, time=0.0), Recorder([codes]) as recorder:
        table = StepTable(SCALES, ZERO_POINTS, StepContext())
        pair = table._pairs[0]
        first = weights(codes, pair, None, None, torch.float32)
        weights(codes, pair, None, first, torch.float32)
    one, two = recorder.instructions
    (out,), (read, *_) = one.writes, one.reads
    elsewhere = Range(1 << 60, (1 << 60) + 4096)
    half = Range(out.start, (out.start + out.end) // 2)
    program = {
        "nothing": [one, two],
        "reads the sum": [one, made([out], [elsewhere]), two],
        "overwrites what the first product reads": [one, made([], [read]), two],
        "overwrites a part of it": [one, made([], [Range(read.start + 5, read.start + 6)]), two],
        "reads the sum later": [one, two, made([half], [elsewhere])],
        "reads its memory when it is written again": [one, two, made([], [half]), made([half], [elsewhere])],
        "reads its memory when a part is written again": [
            one, two, made([], [half]), made([out], [elsewhere]),
        ],
    }[between]  # fmt: skip
    assert (len(with_sums(program)) < len(program)) == sums


def test_an_arena_gives_out_what_nothing_refers_to() -> None:
    arena = Arena()
    first = arena.empty((4, 4), torch.float32)
    place, view = first.data_ptr(), first.flatten()[3:]
    del first
    second = arena.empty((2, 2), torch.float32)
    assert second.data_ptr() != place  # the view is there
    del view
    third = arena.empty((4, 2), torch.float32)
    assert third.data_ptr() == place
    assert arena.size == 64 + 64


def test_neighbours_that_are_free_are_one_gap() -> None:
    arena = Arena(chunk=256)
    parts = [arena.empty((64,), torch.uint8) for _ in range(4)]
    places = [part.data_ptr() for part in parts]
    del parts[1:3]
    assert arena.empty((128,), torch.uint8).data_ptr() == places[1]
    assert arena.empty((65,), torch.uint8).data_ptr() == places[1]  # nothing refers to the one before
    assert arena.size == 256
    large = arena.empty((512,), torch.uint8)
    assert large.data_ptr() not in range(places[0], places[0] + 256)
    large.fill_(7)
    assert all(part.data_ptr() in places for part in parts)


def test_an_arena_keeps_what_is_pinned() -> None:
    arena = Arena()
    source, copy = arena.empty((4,), torch.float32), arena.empty((4,), torch.float32)
    places = {source.data_ptr(), copy.data_ptr()}
    arena.pin(copy, [source])
    del source
    assert arena.empty((4,), torch.float32).data_ptr() not in places
    del copy
    found = [arena.empty((4,), torch.float32) for _ in range(3)]
    assert places < {tensor.data_ptr() for tensor in found}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.add_(1), "add_.Scalar touches what a kernel wrote|add_.Tensor touches what a kernel"),
        (lambda x: x + 1, "quantize reads what aten.* computed"),
        (lambda x: x * float(x.sum()), "touches what a kernel wrote|reads what aten.* computed"),
        (lambda x: x.flip(0), "quantize reads what aten.* computed"),
    ],
)
def test_what_torch_computes_ends_a_recording(change: Any, reason: str, table: StepTable) -> None:
    layer, pair = product(16, 16, 3), table._pairs[0]
    x = image(2, 16, 4, 4)
    with Recorder([x]) as recorder:
        output = layer(native.quantize(x, pair), pair, None, None, torch.float32)
        native.quantize(change(output), pair)
    assert re.search(reason, recorder.obstacle)


def test_numbers_of_one_step_end_a_recording() -> None:
    x = image(2, 16, 4, 4)
    with Recorder([x]) as recorder:
        native.quantize(x, (0.01, 100))
    assert recorder.obstacle == "a quantizer belongs to no table of steps"


def test_other_threads_are_not_recorded(table: StepTable) -> None:
    x = image(2, 16, 4, 4)
    with Recorder([x]) as recorder:
        other = threading.Thread(target=lambda: native.quantize(x, table._pairs[0]))
        other.start()
        other.join()
        assert recording.active() is recorder
    assert recorder.instructions == []
    assert recording.active() is None
