"""The search on a histogram against the exact one on all values, with extremes of the same weight."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from errata.compress.quantize import range_search
from errata.compress.quantize.histogram import histogram
from errata.compress.quantize.quantizers import choose_range
from errata.compress.quantize.range_search import choose_range_by_histogram
from errata.runtime.ranges import dequantize, quantize

COUNT = 3 * 16384
# Two neighbouring candidates are 2 % of the full range apart, and their errors near the best one 5 %.
BOUND = 1.005


def student(freedom: float) -> Callable[[], Tensor]:
    return lambda: torch.distributions.StudentT(freedom).sample((COUNT,))


DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(COUNT),
    "heavy tails": student(3.0),
    "heavier tails": student(1.2),
    "one outlier": lambda: torch.cat([torch.randn(COUNT - 1), torch.tensor([60.0])]),
    "silu": lambda: torch.nn.functional.silu(3 * torch.randn(COUNT)),
    "positive": lambda: torch.empty(COUNT).exponential_(),
    "negative": lambda: -torch.empty(COUNT).exponential_(),
    "far from zero": lambda: torch.rand(COUNT) + 5,
    "two heaps": lambda: 0.01 * torch.randn(COUNT) + (torch.arange(COUNT) % 2),
    "tiny": lambda: 1e-6 * torch.randn(COUNT),
    "huge": lambda: 1e13 * torch.randn(COUNT),
    "softmax": lambda: torch.softmax(3 * torch.randn(COUNT // 256, 256), dim=-1).flatten(),
}


def weighted(values: Tensor) -> Tensor:
    """The values with their extremes as often as the search on a histogram counts them."""
    extremes = torch.stack([values.min(), values.max()])
    return torch.cat([values, extremes.repeat(len(values) // 16384)])


def error(values: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int) -> float:
    fitted = dequantize(quantize(values, scale, zero_point, bits=bits), scale, zero_point)
    return float((fitted - values).double().abs().pow(2.4).mean())


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_the_range_is_as_good_as_the_best(name: str, bits: int) -> None:
    values, from_zero = DISTRIBUTIONS[name](), name == "softmax"
    found = choose_range_by_histogram(
        histogram(values), values.min(), values.max(), bits=bits, from_zero=from_zero
    )
    counted = weighted(values)
    best = choose_range(counted, bits=bits, from_zero=from_zero)
    assert error(counted, *found, bits=bits) <= BOUND * error(counted, *best, bits=bits)
    assert float(found[0] / best[0]) == pytest.approx(1, abs=0.11)  # two candidates at the narrow end


@pytest.mark.parametrize("value", [0.0, 5.0, -0.3, 1e-15, 3e-7])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_constant_has_the_exact_range(value: float, bits: int) -> None:
    values = torch.full((20000,), value)
    found = choose_range_by_histogram(histogram(values), values[0], values[0], bits=bits)
    assert torch.equal(torch.stack(found), torch.stack(choose_range(values, bits=bits)))


def test_a_rare_large_value_counts_although_no_sample_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, low, high = histogram(torch.randn(65536).abs()), torch.tensor(0.0), torch.tensor(12.0)
    scale, _ = choose_range_by_histogram(counts, low, high, bits=8)
    monkeypatch.setattr(range_search, "_VALUES_PER_EXTREME", 10**12)
    without, _ = choose_range_by_histogram(counts, low, high, bits=8)
    assert without < 0.7 * scale


@pytest.mark.parametrize("extreme", [torch.nan, torch.inf, -torch.inf])
def test_an_extreme_that_is_not_finite_is_refused(extreme: float) -> None:
    counts = histogram(torch.randn(100))
    with pytest.raises(ValueError, match="no range fits"):
        choose_range_by_histogram(counts, torch.tensor(0.0), torch.tensor(extreme), bits=8)
