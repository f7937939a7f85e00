"""Layers on `torch._int_mm` and in half precision; how a layer chooses; one program for all steps."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from errata.deploy.cuda.candidates import INT_MM, candidates
from errata.deploy.cuda.chooser import Chooser
from errata.deploy.cuda.selection import Fixed, LayerShape, Measured
from errata.deploy.cuda.tiles import TILES, tile_for
from errata.deploy.cuda.weights import pack_groups, unpack_groups
from errata.deploy.reference import ReferenceQuantizer
from errata.errors import ArtifactError
from errata.runtime.step_context import StepContext

Make = Callable[..., Any]
CASES = [
    (nn.Conv2d(16, 24, 3, padding=1), (16,), (2, 16, 5, 6)),
    (nn.Conv2d(16, 24, 3, padding=1, stride=2), (16,), (2, 16, 6, 7)),
    (nn.Conv2d(16, 24, 3, padding=(2, 0), dilation=2), (16,), (2, 16, 6, 7)),
    (nn.Conv2d(16, 24, 1, stride=2, bias=False), (16,), (3, 16, 5, 5)),
    (nn.Conv2d(40, 24, 1, bias=False), (16, 24), (2, 40, 4, 4)),
    (nn.Conv2d(40, 24, 3, padding=1), (16, 24), (1, 40, 4, 5)),
    (nn.Linear(16, 32), (16,), (2, 10, 16)),
    (nn.Linear(40, 32), (16, 24), (77, 40)),
]


def check(case: Any, x: Tensor, bound: float, residual: Tensor | None = None) -> None:
    outputs = []
    for step in range(3):
        with case.context.at(step):
            outputs.append(case.layer(x, residual))
        expected = case.expected(x, step, residual)
        assert outputs[-1].dtype is x.dtype
        assert (outputs[-1] - expected).abs().max() <= bound * expected.abs().max()
        others = [(output - expected).abs().max() for output in outputs[:-1]]
        assert all(other > 10 * bound * expected.abs().max() for other in others)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("module", "widths", "shape"), CASES)
def test_int_mm_equals_float64_arithmetic_on_the_codes(
    module: nn.Conv2d | nn.Linear, widths: tuple[int, ...], shape: tuple[int, ...], bits: int, make_case: Make
) -> None:
    case = make_case(module, widths, Fixed(INT_MM), bits=bits)
    x = torch.randn(shape) * 2
    check(case, x, 1e-6)
    check(case, x, 1e-6, torch.randn_like(case.expected(x, 0).float()) * 5)
    check(case, x.bfloat16(), 2**-8)


@pytest.mark.parametrize(("module", "widths", "shape"), CASES)
def test_scales_stay_exact_when_the_network_is_converted_to_half_precision(
    module: nn.Conv2d | nn.Linear, widths: tuple[int, ...], shape: tuple[int, ...], make_case: Make
) -> None:
    case = make_case(module, widths, Fixed(INT_MM))
    x = (torch.randn(shape) * 2).bfloat16()
    with case.context.at(1):
        before = case.layer(x)
        case.layer.to(torch.bfloat16)
        for name in ("weights", "tables"):
            for part in getattr(case.layer, name):
                assert part.scale.dtype is torch.float32
                assert not torch.equal(part.scale, part.scale.bfloat16().float())  # rounding would show
        after = case.layer(x)
    # All that is rounded is the bias.
    assert (after - before).abs().max() <= 2**-7 * before.abs().max()


@pytest.mark.parametrize(("module", "widths", "shape"), CASES)
def test_half_precision_is_the_layer_without_rounding_of_its_input(
    module: nn.Conv2d | nn.Linear, widths: tuple[int, ...], shape: tuple[int, ...], make_case: Make
) -> None:
    case = make_case(module, widths, Fixed("half bfloat16"))
    x = torch.randn(shape) * 2
    bias = None if case.bias is None else case.bias.double()
    expected = case.layer.geometry.apply(x.double(), case.weight.double(), bias)
    residual = torch.randn_like(expected).float()
    with case.context.at(0):
        for output, wanted in ((case.layer(x), expected), (case.layer(x, residual), expected + residual)):
            assert output.dtype is torch.float32
            assert (output - wanted).abs().max() <= 0.01 * wanted.abs().max()


def test_int4_groups_are_undone_exactly() -> None:
    codes = torch.randint(-7, 8, (5, 9, 130), dtype=torch.int8)
    packed = pack_groups(codes)
    assert packed.shape == (5, 9, 3, 32)
    assert torch.equal(unpack_groups(packed, 130), codes)


def test_a_compiled_layer_is_compiled_once_for_all_steps(make_case: Make) -> None:
    for index in (1, 5, 7):
        torch._dynamo.reset()
        case = make_case(*CASES[index][:2], Fixed(INT_MM))
        x, counter = torch.randn(CASES[index][2]), CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(case.layer, backend=counter, fullgraph=True)
        with torch.no_grad():
            for step in (0, 1, 2, 1):
                with case.context.at(step):
                    assert torch.equal(compiled(x), case.layer(x))
        assert counter.frame_count == 1


def test_a_compiled_block_is_compiled_once_for_all_steps(make_case: Make) -> None:
    """Convolution, activation function, reference quantizer and linear layer, as in a block of a UNet."""
    conv, linear = make_case(*CASES[0][:2], Fixed(INT_MM)), make_case(nn.Linear(24, 8), (24,), Fixed(INT_MM))
    linear.layer.tables[0].context = conv.context
    table = linear.layer.tables[0]
    quantizer = ReferenceQuantizer(table.scale, table.zero_point, bits=8, context=conv.context)

    def block(x: Tensor) -> Tensor:
        hidden = nn.functional.silu(conv.layer(x)).flatten(2).mT
        return linear.layer(quantizer(hidden))

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    x = torch.randn(CASES[0][2])
    outputs = []
    with torch.no_grad():
        for step in range(3):
            with conv.context.at(step):
                outputs.append(compiled(x))
                assert torch.equal(outputs[-1], block(x))
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])


class FixedTimes:
    """Times by the order of preparation; nothing is run but once."""

    def __init__(self, *seconds: float) -> None:
        self._seconds = list(seconds)

    def prepare(self, call: Callable[[], object]) -> Callable[[], float]:
        call()
        seconds = self._seconds.pop(0)
        return lambda: seconds


def measured(*seconds: float, has_triton: bool = False) -> Measured:
    return Measured(Chooser(FixedTimes(*seconds), None), has_triton=has_triton, machine={"device": "none"})


@pytest.mark.parametrize(("seconds", "chosen"), [((1.0, 2.0), INT_MM), ((2.0, 1.0), "half bfloat16")])
def test_the_fastest_way_runs_and_the_others_are_freed(
    seconds: Sequence[float], chosen: str, make_case: Make
) -> None:
    selection = measured(*seconds)
    case = make_case(*CASES[0][:2], selection)
    told: list[str] = []
    selection.on_choice = lambda: told.append("choice")
    x = torch.randn(CASES[0][2])
    with case.context.at(1):
        outputs = [case.layer(x) for _ in range(2)]
        assert list(case.layer.products) == [chosen]
        expected = case.layer.compute(chosen, [x.permute(0, 2, 3, 1)], None).permute(0, 3, 1, 2)
    assert all(torch.equal(output, expected) for output in outputs)
    assert told == ["choice"]
    ((shape, choice),) = selection.choices.items()
    assert shape.describe() == "2x16x5x6 float32"
    assert choice.name == chosen


def test_every_shape_is_chosen_for_apart(make_case: Make) -> None:
    selection = measured(1.0, 2.0, 2.0, 1.0, 1.0)
    case = make_case(*CASES[6][:2], selection)
    with case.context.at(0):
        for rows in (20, 40, 16):
            case.layer(torch.randn(rows, 16))
    assert [choice.name for choice in selection.choices.values()] == [
        INT_MM,
        "half bfloat16",
        "half bfloat16",
    ]
    assert [len(choice.seconds) for choice in selection.choices.values()] == [2, 2, 1]  # 16 rows: no _int_mm


def test_a_new_shape_in_a_recording_is_refused(make_case: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(*CASES[6][:2], measured(1.0, 2.0))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with (
        case.context.at(0),
        pytest.raises(ArtifactError, match="'layer' sees 20x16 float32 for the first time.*call the network"),
    ):
        case.layer(torch.randn(20, 16))


def test_tracing_takes_the_kernel_that_suits_unmeasured(
    make_case: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = measured(has_triton=True)
    layer = make_case(*CASES[6][:2], selection).layer
    assert set(layer.products) == set(TILES)  # made before: nothing can be while tracing
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    parts = [torch.randn(20, 1, 1, 16)]
    shape = LayerShape.of(layer, parts, torch.randn(20, 16), None)
    assert selection.pick(layer, shape, parts, None) == "triton 64x64"
    assert selection.choices == {}


def test_a_chosen_way_is_compiled_once_for_all_steps(make_case: Make) -> None:
    torch._dynamo.reset()
    case = make_case(*CASES[0][:2], measured(1.0, 2.0))
    x, counter = torch.randn(CASES[0][2]), CompileCounterWithBackend("aot_eager")
    with case.context.at(0):
        case.layer(x)
    compiled = torch.compile(case.layer, backend=counter, fullgraph=True)
    with torch.no_grad():
        for step in range(3):
            with case.context.at(step):
                assert torch.equal(compiled(x), case.layer(x))
    assert counter.frame_count == 1


def test_candidates_are_those_that_can_run() -> None:
    sizes: dict[str, Any] = {"channels": (320, 640), "out_channels": 320, "taps": 9, "dtype": torch.float16}
    assert candidates(rows=64, has_triton=True, **sizes) == (*TILES, INT_MM, "half float16")
    assert candidates(rows=16, has_triton=False, **sizes) == ("half float16",)
    narrow = {**sizes, "channels": (3,), "dtype": torch.float32}
    assert candidates(rows=64, has_triton=True, **narrow) == (*TILES, "half bfloat16")
    assert candidates(rows=64, has_triton=False, **{**sizes, "out_channels": 4}) == ("half float16",)


def test_unmeasured_tiles_suit_the_rows() -> None:
    assert tile_for(1, 1280) == tile_for(16, 320) == "triton 16x64"
    assert tile_for(77, 768) == "triton 64x64"
    assert tile_for(65536, 320) == "triton 128x128"


def test_sums_beyond_32_bits_are_refused(make_case: Make) -> None:
    with pytest.raises(ValueError, match="layer 'layer' sums 70000 products; 32 bits hold 66311"):
        make_case(nn.Linear(70000, 1), (70000,), Fixed(INT_MM))
    with pytest.raises(ValueError, match="padding='same' is not supported"):
        make_case(nn.Conv2d(8, 8, 3, padding="same"), (8,), Fixed(INT_MM))


def test_outside_an_evaluation_a_layer_is_an_error(make_case: Make) -> None:
    case = make_case(*CASES[6][:2], Fixed(INT_MM))
    with case.context.at(1):
        case.layer(torch.randn(20, 16))
    with pytest.raises(RuntimeError, match="no single sampling step is set"):
        case.layer(torch.randn(20, 16))
    with case.context.at(torch.tensor([0, 1])), pytest.raises(RuntimeError, match="all rows at one step"):
        case.layer(torch.randn(20, 16))


def test_a_clock_shows_its_step_on_a_device() -> None:
    context, cpu = StepContext(), torch.device("cpu")
    with torch.inference_mode():
        shown = context.follow(cpu)
    for step in (3, 1):
        with context.at(step):
            assert context.step_on(cpu) is shown
            assert shown.tolist() == [step]
    late = StepContext()
    with late.at(2):
        assert late.step_on(cpu).tolist() == [2]
    twin = copy.deepcopy(late)
    with twin.at(5):
        assert twin.step_on(cpu).tolist() == [5]
        assert late.follow(cpu).tolist() == [2]  # each has its own
