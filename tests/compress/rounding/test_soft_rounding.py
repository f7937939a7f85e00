import pytest
import torch
from torch import Tensor

from errata.compress.quantize.quantizers import quantize_weight
from errata.compress.rounding.reconstruction import SoftRounding


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 5, 3, 3)


def soft(weight: Tensor, bits: int = 4) -> tuple[SoftRounding, Tensor, Tensor]:
    codes, scale = quantize_weight(weight, bits=bits)
    column = scale.reshape(-1, 1, 1, 1)
    return SoftRounding(weight, column, bits=bits), codes, column


@pytest.mark.parametrize("bits", [4, 8])
def test_it_starts_at_the_float_weight_and_at_nearest_codes(weight: Tensor, bits: int) -> None:
    rounding, codes, scale = soft(weight, bits)
    limit = 2 ** (bits - 1) - 1
    torch.testing.assert_close(rounding.weight(), weight.clamp(-limit * scale, limit * scale))
    assert rounding.codes().dtype == torch.int8
    assert torch.equal(rounding.codes(), codes)


def test_codes_are_floor_or_ceiling_within_the_range(weight: Tensor) -> None:
    rounding, codes, scale = soft(weight)
    for value, expected in ((-10.0, (weight / scale).floor()), (10.0, (weight / scale).floor() + 1)):
        with torch.no_grad():
            rounding.value.fill_(value)
        assert torch.equal(rounding.codes().float(), expected.clamp(-7, 7))
        assert torch.equal(rounding.weight(), rounding.codes() * scale)  # decided: soft is hard
        assert rounding.softness(2.0) == 0
        assert (rounding.codes() - codes).abs().max() <= 1


def test_softness_falls_towards_a_decision(weight: Tensor) -> None:
    rounding, _, _ = soft(weight)
    before = rounding.softness(2.0)
    optimiser = torch.optim.Adam([rounding.value], lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        rounding.softness(2.0).backward()
        optimiser.step()
    assert 0 <= rounding.softness(2.0) < 0.01 * before
