import pytest
import torch
from brevitas.core.function_wrapper import Identity
from brevitas.core.function_wrapper.learned_round import LearnedRoundHardSigmoid, LearnedRoundSte
from torch import Tensor

from errata.compress.quantize.quantizers import quantize_weight
from errata.compress.rounding.soft_rounding import GAMMA, ZETA, SoftRounding


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
        rounding.value.grad = torch.zeros_like(rounding.value)
        rounding.add_softness_gradient_(2.0, 1.0)
        optimiser.step()
    assert 0 <= rounding.softness(2.0) < 0.01 * before


@pytest.mark.parametrize("bits", [4, 8])
def test_values_and_gradients_are_those_of_brevitas(weight: Tensor, bits: int) -> None:
    rounding, _, scale = soft(weight, bits)
    limit = 2 ** (bits - 1) - 1
    with torch.no_grad():
        rounding.value.add_(
            torch.randn(weight.shape)
        )  # some of them beyond the ends of the stretched sigmoid
    impl = LearnedRoundHardSigmoid(ZETA, GAMMA)
    theirs = LearnedRoundSte(impl, rounding.value.detach().clone(), Identity())
    upstream, beta, factor = torch.randn(weight.shape), 3.0, 0.7

    expected = theirs.train()(weight / scale).clamp(-limit, limit) * scale
    softness = 1 - (2 * impl(theirs.value) - 1).abs().pow(beta).mean()
    ((expected * upstream).sum() + factor * softness).backward()

    found = rounding.weight()
    (found * upstream).sum().backward()
    rounding.add_softness_gradient_(beta, factor)
    assert theirs.value.grad is not None
    assert (theirs.value.grad == 0).any()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(rounding.value.grad, theirs.value.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(rounding.softness(beta), softness.detach())
    hard = theirs.eval()(weight / scale).clamp(-limit, limit)
    assert torch.equal(rounding.codes().float(), hard)
