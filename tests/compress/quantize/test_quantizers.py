import pytest
import torch
from weight_search import quick_weight_search

from errata.compress.quantize.quantizers import StepwiseQuantizer, quantize_weight
from errata.runtime.ranges import dequantize, quantize
from errata.runtime.step_context import StepContext


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3, 3), (6, 5, 1, 1)])
def test_weight_codes_are_symmetric_and_per_channel(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape) * torch.logspace(-2, 1, 6).reshape(-1, *[1] * (len(shape) - 1))
    codes, scale = quantize_weight(weight, bits=bits)
    limit = 2 ** (bits - 1) - 1
    assert codes.dtype is torch.int8
    assert codes.shape == weight.shape
    assert scale.shape == (6,)
    assert -limit <= int(codes.min()) < 0 < int(codes.max()) <= limit
    assert 50 < scale[-1] / scale[0] < 20000  # a scale of its own for every channel


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(40, 72), (1, 1), (24, 33, 3, 3)])
def test_the_search_of_other_tests_is_brevitas_to_the_last_bit(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    spread = torch.logspace(-12, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    dead = weight.clone()
    dead[0] = 0
    for one in (weight, weight * spread, (weight * 4).round() / 4, dead):  # plain, uneven, many ties, zeros
        for found, expected in zip(
            quick_weight_search(one, bits=bits), quantize_weight(one, bits=bits), strict=True
        ):
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def test_weight_range_search_beats_the_plain_maximum() -> None:
    weight = torch.randn(16, 32, 3, 3)
    codes, scale = quantize_weight(weight, bits=4)
    found = (codes * scale[:, None, None, None] - weight).square().mean()
    plain = weight.abs().amax((1, 2, 3), keepdim=True) / 7
    assert found < 0.8 * ((weight / plain).round() * plain - weight).square().mean()


def test_stepwise_quantizer_equals_the_free_functions_at_every_step() -> None:
    context = StepContext()
    scale, zero_point = torch.tensor([0.01, 0.05, 0.4]), torch.tensor([10.0, 128.0, 200.0])
    quantizer = StepwiseQuantizer(scale, zero_point, bits=8, context=context)
    x = torch.randn(4, 3, 5, 5) * 3
    outputs = []
    for step in range(3):
        with context.at(step):
            outputs.append(quantizer(x))
        expected = quantize(x, scale[step], zero_point[step], bits=8)
        assert torch.equal(outputs[-1], dequantize(expected, scale[step], zero_point[step]))
    assert (outputs[0] - outputs[2]).abs().max() > 1  # the wrong step would show


def test_a_quantizer_outside_an_evaluation_is_an_error() -> None:
    quantizer = StepwiseQuantizer(torch.ones(2), torch.zeros(2), bits=8, context=StepContext())
    with pytest.raises(RuntimeError, match="no sampling step is set"):
        quantizer(torch.ones(1))


def test_evaluations_do_not_nest() -> None:
    context = StepContext()
    with context.at(3), pytest.raises(RuntimeError, match="step 3 is still being evaluated"), context.at(4):
        pass
