"""A weight whose rounding is learned: the variables of AdaRound, built on brevitas."""

from __future__ import annotations

import torch
from brevitas.core.function_wrapper import Identity
from brevitas.core.function_wrapper.learned_round import LearnedRoundHardSigmoid, LearnedRoundSte
from torch import Tensor, nn

from errata.runtime.weight_formats import weight_format

# Stretch of the sigmoid, so that it reaches 0 and 1 (Louizos et al., 2018); AdaRound's values.
_ZETA = 1.1
_GAMMA = -0.1


class SoftRounding(nn.Module):
    """Codes `floor(w) + h(V)` of a weight, with `w` the weight in units of its scale.

    | here    | AdaRound | |
    |---------|----------|-|
    | `units` | W / s    | the float weight in units of its scale |
    | `value` | V        | what is learned, one per weight |
    | `h()`   | h(V)     | `clip(sigmoid(V) (ζ - γ) + γ, 0, 1)` |

    At first `h` is the fraction of `w`, so that the soft weight is the float weight (clipped to the codes).

    Source: Nagel et al., AdaRound (ICML 2020), equations 22 to 24.
    """

    def __init__(self, weight: Tensor, scale: Tensor, *, bits: int) -> None:
        """`weight`: `(O, I, …)`, float32; `scale`: broadcasts to it; codes as the format of `bits` allows."""
        super().__init__()
        self.units = weight.detach() / scale
        self.scale = scale
        self.limit = weight_format(bits).limit
        fraction = self.units - self.units.floor()
        start = -torch.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1)
        self.rounding = LearnedRoundSte(LearnedRoundHardSigmoid(_ZETA, _GAMMA), start, Identity())

    @property
    def value(self) -> nn.Parameter:
        """The learned variables, of the weight's shape."""
        variables: nn.Parameter = self.rounding.value
        return variables

    def weight(self) -> Tensor:
        """The soft weight, differentiable in `value`."""
        self.rounding.train()
        soft: Tensor = self.rounding(self.units)
        return soft.clamp(-self.limit, self.limit) * self.scale

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The hard codes, int8: every weight at its floor or one above, within the range of the codes."""
        self.rounding.eval()
        hard: Tensor = self.rounding(self.units)
        return hard.clamp(-self.limit, self.limit).to(torch.int8)

    def softness(self, beta: float) -> Tensor:
        """Mean of `1 - |2 h(V) - 1|^β`: 0 where every weight has decided."""
        self.rounding.train()
        h: Tensor = self.rounding.learned_round_impl(self.value)
        return 1 - (2 * h - 1).abs().pow(beta).mean()
