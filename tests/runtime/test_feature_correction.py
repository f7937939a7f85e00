from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from errata.runtime.feature_correction import CorrectedOutput, FeatureCorrection
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext


def test_a_layer_is_corrected_after_its_bias() -> None:
    conv = nn.Conv2d(2, 3, 1)
    nn.init.constant_(conv.bias, 100.0)  # type: ignore[arg-type]
    gain, shift = torch.tensor([[1.0] * 3, [3.0, 0.5, -1.0]]), torch.tensor([[0.0] * 3, [1.0, 2.0, 3.0]])
    context = StepContext()
    corrected = CorrectedOutput(conv, gain, shift, context, is_conv=True)
    x = torch.randn(2, 2, 4, 4)
    a, b = (value[1][:, None, None] for value in (gain, shift))
    product = functional.conv2d(x, conv.weight)
    bias = conv.bias[:, None, None]  # type: ignore[index]
    with context.at(1, "cached"):
        found = corrected(x)
    torch.testing.assert_close(found, a * (product + bias) + b)
    assert (found - (a * product + bias + b)).abs().amin() > 40  # (a - 1) · bias


@pytest.mark.parametrize(("step", "kind"), [(0, "cached"), (0, "full"), (1, "full")])
def test_full_steps_and_full_passes_are_not_corrected(step: int, kind: Any) -> None:
    linear, context = nn.Linear(3, 2), StepContext()
    gain, shift = torch.tensor([[1.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    corrected = CorrectedOutput(linear, gain, shift, context, is_conv=False)
    x = torch.randn(4, 5, 3)
    with context.at(step, kind):
        assert torch.equal(corrected(x), linear(x))
    with context.at(1, "cached"):
        torch.testing.assert_close(corrected(x), linear(x) * gain[1] + shift[1])


def test_a_feature_keeps_its_type() -> None:
    correction = FeatureCorrection(torch.tensor([[1.5]]), torch.tensor([[0.25]]))
    feature = torch.randn(2, 1, 3, 3).half()
    found = correction(feature, 0)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, (feature.float() * 1.5 + 0.25).half(), rtol=0, atol=0)


def test_no_scheme_asks_for_it_without_cachequant() -> None:
    assert FeatureCorrection.of(Scheme(), {}) is None
