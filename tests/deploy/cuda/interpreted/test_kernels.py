"""The kernels' integers against int64 arithmetic on the codes, bit for bit."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from errata.deploy.cuda import operators
from errata.deploy.cuda.operators import activation_codes, int8_product, window_numbers
from errata.deploy.cuda.tiles import TILES
from errata.deploy.cuda.weights import PartWeight
from errata.deploy.cuda.window import Window
from errata.runtime.ranges import quantize

SCALES = torch.tensor([0.004, 0.02, 0.1])
ZERO_POINTS = torch.tensor([0, 90, 255], dtype=torch.int32)
WINDOWS = [
    Window(),
    Window(kernel=(3, 3), padding=(1, 1)),
    Window(kernel=(3, 3), padding=(1, 1), stride=(2, 2)),
    Window(kernel=(3, 3), stride=(2, 2)),
    Window(kernel=(1, 1), stride=(2, 2)),
    Window(kernel=(1, 1), padding=(1, 1)),
    Window(kernel=(3, 1), padding=(2, 0), stride=(1, 2), dilation=(2, 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_codes_are_those_of_the_reference(dtype: torch.dtype, layout: str) -> None:
    x = torch.randn(2, 5, 7, 33) * 6
    x[0, 0] = (torch.arange(7 * 33).reshape(7, 33) - 100) * 0.5 * 0.02  # ties, most of them
    x[1, 0, 0, :4] = torch.tensor([1e6, -1e6, float("inf"), float("-inf")])
    x = x.to(dtype)
    given = x if layout == "NHWC" else x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    found = []
    for step in range(3):
        codes = activation_codes(given, SCALES, ZERO_POINTS, torch.tensor([step]))
        expected = quantize(x.float(), SCALES[step], ZERO_POINTS[step], bits=8)
        assert codes.dtype is torch.int8
        assert codes.is_contiguous()
        assert torch.equal(codes.int() + 128, expected.int())
        found.append(codes)
    assert all((one != other).float().mean() > 0.1 for one, other in itertools.pairwise(found))


def test_halves_are_rounded_to_even() -> None:
    x = torch.arange(-3.5, 260).reshape(1, 1, 1, -1)
    codes = activation_codes(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.zeros(1).long())
    assert torch.equal(codes.flatten().float() + 128, x.flatten().round().clamp(0, 255))
    assert int(codes[0, 0, 0, 4]) + 128 == 0  # 0.5
    assert int(codes[0, 0, 0, 5]) + 128 == 2  # 1.5


def integers(q: Tensor, codes: Tensor, window: Window, zero_point: int, *, padding: int = 0) -> Tensor:
    """`Σ (q - z) w` in int64, padded pixels being real zeros unless said otherwise; `(B, H', W', O)`."""
    vertical, horizontal = window.padding
    sides = (0, 0, horizontal, horizontal, vertical, vertical)
    padded = functional.pad(q.long() - zero_point, sides, value=padding)
    height, width = window.output_size(*q.shape[1:3])
    total = torch.zeros(q.shape[0], height, width, codes.shape[0], dtype=torch.int64)
    for row in range(window.kernel[0]):
        for column in range(window.kernel[1]):
            y, x = row * window.dilation[0], column * window.dilation[1]
            shifted = padded[:, y :: window.stride[0], x :: window.stride[1]][:, :height, :width]
            total += shifted @ codes[:, :, row, column].long().T
    return total


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_integer_part_is_exact(window: Window, bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    q = torch.randint(0, 256, (2, 5, 6, 37), dtype=torch.uint8)
    codes = torch.randint(-limit, limit + 1, (19, 37, *window.kernel), dtype=torch.int8)
    weight = PartWeight(codes, torch.ones(19), bits=bits)
    for step, zero_point in enumerate(ZERO_POINTS.tolist()):
        found = product(q, weight, window, step)
        expected = integers(q, codes, window, zero_point)
        assert torch.equal(found, expected.float())
        if window.padding != (0, 0):  # padded pixels that counted as a code of 128, stored as 0, would show
            wrong = integers(q, codes, window, zero_point, padding=128 - zero_point)
            assert (wrong - expected).abs().max() > 100


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("rows", "channels", "columns"), [(1, 64, 70), (16, 130, 8), (77, 96, 65), (130, 7, 3)]
)
def test_every_tile_serves_every_size(tile: str, rows: int, channels: int, columns: int) -> None:
    q = torch.randint(0, 256, (rows, 1, 1, channels), dtype=torch.uint8)
    for bits in (8, 4):
        limit = 2 ** (bits - 1) - 1
        codes = torch.randint(-limit, limit + 1, (columns, channels, 1, 1), dtype=torch.int8)
        found = product(q, PartWeight(codes, torch.ones(columns), bits=bits), Window(), 1, tile=tile)
        assert torch.equal(found, integers(q, codes, Window(), 90).float())


def test_sums_beyond_what_float32_counts_are_exact() -> None:
    q = torch.full((1, 1, 1, 3000), 255, dtype=torch.uint8)
    codes = torch.full((2, 3000, 1, 1), 127, dtype=torch.int8)
    codes[1, 0] = 126
    found = product(q, PartWeight(codes, torch.ones(2), bits=8), Window(), 0)
    expected = integers(q, codes, Window(), 0)
    assert int(expected.max()) > 2**24
    assert torch.equal(found, expected.float())
    assert found[0, 0, 0, 0] != found[0, 0, 0, 1]


def product(
    q: Tensor, weight: PartWeight, window: Window, step: int, *, tile: str = "triton 16x64"
) -> Tensor:
    numbers = TILES[tile].numbers(is_int4=weight.bits == 4)
    stored = (q.int() - 128).to(torch.int8)
    ones = torch.ones(3)
    return int8_product(
        stored, weight.codes, weight.column_sum, weight.scale, None, None, ones, ZERO_POINTS,
        torch.tensor([step]), window_numbers(window), weight.bits == 4, torch.float32, numbers,
    )  # fmt: skip


def test_what_32_bit_offsets_cannot_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "LARGEST_TENSOR", 10)
    x = torch.ones(3, 2, 2, 1)
    with pytest.raises(
        ValueError, match=r"the input \[3, 2, 2, 1\] spans 11 elements; the kernel takes at most 10"
    ):
        activation_codes(x, SCALES, ZERO_POINTS, torch.tensor([0]))
