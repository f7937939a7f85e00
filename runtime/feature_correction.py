"""Where a cache correction acts: on the feature that a cached step reads, and on the outputs of its readers.

Simulation and every backend of an artifact use these very modules, so the two agree bit for bit.

Source: decoupled error correction of CacheQuant (Liu et al., CVPR 2025), section 3.3. Deviation: the paper's
code folds the output's gain into the weight and leaves the layer's bias as it is, which omits
`(gain - 1) · bias`; here the output as a whole is corrected.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from errata.runtime.layers import replace_module
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext

# Names of the cache's own pair in the table of a scheme, and of the pairs of the layers that read it.
FEATURE = ("cache.gain", "cache.shift")
OUTPUT = ("{layer}.output_gain", "{layer}.output_shift")


class FeatureCorrection:
    """`gain ⊙ feature + shift` of the step that reads; the stored feature stays as it is.

    `gain` and `shift` are `(T, C)`. The arithmetic is theirs, the result has the feature's type.
    """

    def __init__(self, gain: Tensor, shift: Tensor) -> None:
        self._gain = gain
        self._shift = shift

    @classmethod
    def of(cls, scheme: Scheme, table: Mapping[str, Tensor]) -> FeatureCorrection | None:
        """Return the correction that a scheme asks for, with numbers of its table; None without one."""
        if scheme.correction is None:
            return None
        gain, shift = (table[name] for name in FEATURE)
        return cls(gain, shift)

    def __call__(self, feature: Tensor, step: int) -> Tensor:
        """Return the corrected copy of a feature `(B, C, H, W)`."""
        if self._gain.device != feature.device:  # once: a pipeline seldom moves
            self._gain, self._shift = self._gain.to(feature.device), self._shift.to(feature.device)
        gain, shift = self._gain[step], self._shift[step]
        return (feature * gain[:, None, None] + shift[:, None, None]).to(feature.dtype)


class CorrectedOutput(nn.Module):
    """A layer whose output is corrected, `gain ⊙ (W x + bias) + shift`, in cached evaluations only.

    Buffers `gain` and `shift`, `(T, O)`. A full evaluation, at whatever step, is that of the layer itself.
    """

    def __init__(
        self, layer: nn.Module, gain: Tensor, shift: Tensor, context: StepContext, *, is_conv: bool
    ) -> None:
        super().__init__()
        self.layer = layer
        self.gain: Tensor
        self.shift: Tensor
        shape = (*gain.shape, 1, 1) if is_conv else gain.shape  # channels are dimension 1, or the last
        self.register_buffer("gain", gain.reshape(shape))
        self.register_buffer("shift", shift.reshape(shape))
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, corrected where that is due."""
        output: Tensor = self.layer(x)
        return self.corrected(output) if self.acts else output

    @property
    def acts(self) -> bool:
        """Whether the evaluation under way is a cached one."""
        return self.context.kind != "full"

    def corrected(self, output: Tensor) -> Tensor:
        """Return `gain ⊙ output + shift` of the current step."""
        return output * self.gain[self.context.step] + self.shift[self.context.step]


def correct_outputs(
    unet: nn.Module,
    scheme: Scheme,
    table: Mapping[str, Tensor],
    *,
    context: StepContext,
    device: torch.device | None = None,
) -> tuple[str, ...]:
    """Wrap the layers whose output the scheme corrects, in `unet` itself; return their names.

    `device` is that of the numbers; None stands for the network's own.
    """
    if scheme.correction is None:
        return ()
    if device is None:
        device = next(unet.parameters()).device
    kinds = {layer.name: layer.kind for layer in scheme.layers}
    for corrected in scheme.correction.layers:
        name = corrected.name
        gain, shift = (table[pattern.format(layer=name)] for pattern in OUTPUT)
        layer = unet.get_submodule(name)
        wrapped = CorrectedOutput(layer, gain, shift, context, is_conv=kinds[name] == "conv2d")
        replace_module(unet, name, wrapped.to(device).eval())
    return tuple(corrected.name for corrected in scheme.correction.layers)
