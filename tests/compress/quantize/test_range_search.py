import pytest
import torch

from errata.compress.quantize.quantizers import choose_range
from errata.runtime.ranges import dequantize, quantize


def test_rounding_error_is_at_most_half_a_scale() -> None:
    scale, zero_point = torch.tensor(0.03), torch.tensor(100.0)
    x = torch.linspace(-2.9, 4.6, 1001)
    fitted = dequantize(quantize(x, scale, zero_point, bits=8), scale, zero_point)
    assert (x - fitted).abs().max() <= scale / 2 + 1e-6


def test_codes_are_whole_and_clamped() -> None:
    codes = quantize(torch.tensor([-1e9, 0.0, 1e9]), torch.tensor(1.0), torch.tensor(7.0), bits=4)
    assert codes.tolist() == [0.0, 7.0, 15.0]


def test_range_search_equals_a_plain_loop_in_float64() -> None:
    x = torch.cat([torch.randn(3000), torch.tensor([9.0])])  # an outlier: the full range is not the best
    best = (float("inf"), 0.0, 0)
    for index in range(40):
        factor = 1 - 0.78 * index / 39
        low, high = float(x.min()) * factor, float(x.max()) * factor
        scale = (high - low) / 15
        zero = min(max(round(-low / scale), 0), 15)
        error = 0.0
        for value in x.tolist():
            code = min(max(round(value / scale + zero), 0), 15)
            error += abs(value - (code - zero) * scale) ** 2.4
        best = min(best, (error, scale, zero))
    scale_found, zero_found = choose_range(x, bits=4)
    assert float(scale_found) == pytest.approx(best[1], rel=1e-5)
    assert int(zero_found) == best[2]
    assert best[1] < 0.9 * float(x.max() - x.min()) / 15  # the loop did shrink the range


def test_zero_is_always_on_the_grid() -> None:
    for x in (torch.rand(100) + 5, -torch.rand(100) - 5, torch.randn(100)):
        scale, zero_point = choose_range(x, bits=8)
        zero = torch.zeros(1)
        assert dequantize(quantize(zero, scale, zero_point, bits=8), scale, zero_point) == 0


def test_range_from_zero_has_zero_point_zero() -> None:
    scale, zero_point = choose_range(torch.rand(100), bits=8, from_zero=True)
    assert zero_point == 0
    assert 0.2 / 255 < scale <= 1 / 255


def test_error_falls_fourfold_with_each_bit() -> None:
    x = torch.rand(20000)
    errors = []
    for bits in (4, 5, 6, 7, 8):
        scale, zero_point = choose_range(x, bits=bits)
        fitted = dequantize(quantize(x, scale, zero_point, bits=bits), scale, zero_point)
        errors.append((x - fitted).square().mean().log2())
    slope = (errors[-1] - errors[0]) / 4
    assert slope == pytest.approx(-2, abs=0.1)


@pytest.mark.parametrize(
    "values", [torch.empty(0), torch.tensor([1.0, float("nan")]), torch.tensor([torch.inf])]
)
def test_nothing_finite_to_fit_is_refused(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="no range fits"):
        choose_range(values, bits=8)
