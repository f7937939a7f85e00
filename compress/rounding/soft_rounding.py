"""Codes of a weight that are being learned: each between the floor and the ceiling of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from errata.runtime.weight_formats import weight_format

# Stretch of the sigmoid, so that it reaches 0 and 1 (Louizos et al., 2018); AdaRound's values.
ZETA = 1.1
GAMMA = -0.1


class SoftRounding(nn.Module):
    """Codes `floor(w) + h(V)` of a weight, with `w` the weight in units of its scale.

    | here       | AdaRound | |
    |------------|----------|-|
    | `units`    | W / s    | the float weight in units of its scale |
    | `value`    | V        | what is learned, one per weight |
    | `h()`      | h(V)     | `clip(sigmoid(V) (ζ - γ) + γ, 0, 1)` |

    At first `h` is the fraction of `w`, so that the soft weight is the float weight (clipped to the codes).

    Values and gradients are those of brevitas' `LearnedRoundSte` with `LearnedRoundHardSigmoid`. In closed
    form, with `h` computed once for the weight and its softness, they take a fifth of the time.

    Source: Nagel et al., AdaRound (ICML 2020), equations 22 to 24.
    """

    def __init__(self, weight: Tensor, scale: Tensor, *, bits: int) -> None:
        """Start from `weight` `(O, I, …)`, float32; `scale` broadcasts to it."""
        super().__init__()
        units = weight.detach() / scale
        self.limit = weight_format(bits).limit
        self.floor = units.floor()
        # A weight beyond the codes has no choice.
        is_free = (self.floor >= -self.limit) & (self.floor < self.limit)
        self.scale = scale
        self.slope = (is_free * scale).mul_(ZETA - GAMMA)
        self.value = nn.Parameter(-torch.log((ZETA - GAMMA) / (units - self.floor - GAMMA) - 1))

    def h(self) -> Tensor:
        """Return how far each weight is above its floor, in [0, 1]; no gradient."""
        return _stretched(torch.sigmoid(self.value.detach()))

    def weight(self) -> Tensor:
        """Return the soft weight, differentiable in `value`."""
        weight: Tensor = _SoftWeight.apply(self.value, self.floor, self.scale, self.slope, self.limit)
        return weight

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the hard codes, int8: every weight at its floor or one above, within their range."""
        hard = self.floor + (self.value >= 0)
        return hard.clamp(-self.limit, self.limit).to(torch.int8)

    @torch.no_grad()
    def softness(self, beta: float) -> Tensor:
        """Return the mean of `1 - |2 h(V) - 1|^β`: 0 where every weight has decided."""
        return 1 - (2 * self.h() - 1).abs().pow(beta).mean()

    @torch.no_grad()
    def add_softness_gradient_(self, beta: float, factor: float) -> None:
        """Add the gradient of `factor` times the softness to that of `value`, which has one."""
        gradient = self.value.grad
        assert gradient is not None  # right after the backward pass
        s = torch.sigmoid(self.value)
        distance = _stretched(s).mul_(2).sub_(1)
        power = distance.abs().pow_(beta - 1).copysign_(distance)
        power.mul_(_slope(s))
        gradient.add_(power, alpha=-2 * beta * factor * (ZETA - GAMMA) / s.numel())


class _SoftWeight(torch.autograd.Function):
    """`clip(floor + h(V)) s`, with the gradient of `V`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, floor: Tensor, scale: Tensor, slope: Tensor, limit: int) -> Tensor:
        s = torch.sigmoid(value)
        ctx.save_for_backward(s, slope)
        return _stretched(s).add_(floor).clamp_(-limit, limit).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        s, slope = ctx.saved_tensors
        return _slope(s).mul_(slope).mul_(gradients[0]), None, None, None, None


def _stretched(s: Tensor) -> Tensor:
    return s.mul(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)


def _slope(s: Tensor) -> Tensor:
    """Return the sigmoid's slope `s (1 - s)`, and 0 where the stretched one is cut off."""
    low, high = -GAMMA / (ZETA - GAMMA), (1 - GAMMA) / (ZETA - GAMMA)
    slope = torch.addcmul(s, s, s, value=-1)
    return slope.masked_fill_((s < low) | (s > high), 0)
