import torch
from torch import Tensor

from errata.compress.quantize.quantizers import StepwiseQuantizer, StraightThrough
from errata.runtime.step_context import StepContext


def quantizer(scale: Tensor, context: StepContext) -> StepwiseQuantizer:
    return StepwiseQuantizer(scale, torch.tensor([120.0, 100.0, 3.0]), bits=8, context=context)


def test_values_are_those_of_the_simulated_quantizer() -> None:
    context, step = StepContext(), torch.tensor([2, 0, 0, 1])
    simulated = quantizer(torch.tensor([0.01, 0.02, 0.013]), context)
    x = torch.randn(4, 5, 6)
    with context.at(step):
        expected = simulated(x)
        found = simulated(x.clone().requires_grad_())
    assert found.requires_grad
    assert torch.equal(found, expected)


def test_gradients_are_those_of_its_single_operations() -> None:
    context, step = StepContext(), torch.tensor([2, 0, 0])
    simulated = quantizer(torch.tensor([0.01, 0.02, 0.013]), context)
    upstream = torch.randn(3, 40)
    gradients = []
    for fused in (True, False):
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
        scale = simulated.scale[step][:, None].requires_grad_()
        zero_point = simulated.zero_point[step][:, None]
        if fused:
            y = StraightThrough.apply(x, scale, zero_point, 8)
        else:
            y = simulated.quantizer(scale, zero_point, simulated.bits, x)
        assert ((y == (0 - zero_point) * scale) | (y == (255 - zero_point) * scale)).any()  # some are clipped
        y.backward(upstream)
        gradients.append((x.grad, scale.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
