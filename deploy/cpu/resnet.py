"""diffusers' ResNet blocks and resamplers around int8 layers, without passes over memory that can be saved.

- Normalization, activation and quantization are one operation (`norms`); the codes that the shortcut reads
  are made with it.
- The time embedding's projection is added by the first convolution, as its bias. Where the embedding depends
  on the time alone, that bias is kept for every time that was evaluated.
- Nearest-neighbour upsampling and zero padding are done on the codes, a quarter of the bytes: they commute
  with quantization, padded zeros being the zero point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from errata.deploy.cpu.int8 import Int8Layer
from errata.deploy.cpu.norms import normed_codes
from errata.runtime.feature_correction import CorrectedOutput
from errata.runtime.step_context import StepContext


class FusedResnet(nn.Module):
    """Stands in for a `ResnetBlock2D`, whose layers it shares under the same names.

    Args:
        block: one that `is_fusible`.
        context: tells the time that is evaluated.
        keeps_biases: whether the time embedding follows from that time, for all rows alike.
    """

    def __init__(self, block: Any, context: StepContext, *, keeps_biases: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.conv1, self.conv2 = block.conv1, block.conv2
        self.time_emb_proj = block.time_emb_proj
        self.conv_shortcut = block.conv_shortcut
        self.skip_time_act: bool = block.skip_time_act
        self.output_scale_factor: float = block.output_scale_factor
        self._context = context
        self._keeps_biases = keeps_biases
        self._biases: dict[float, Tensor] = {}

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Whether it is a plain ResNet block whose convolutions are int8 layers."""
        return (
            isinstance(block, ResnetBlock2D)
            and block.upsample is None
            and block.downsample is None
            and block.time_embedding_norm == "default"
            and isinstance(block.nonlinearity, nn.SiLU)
            and isinstance(inner(block.conv1), Int8Layer)
            and isinstance(inner(block.conv2), Int8Layer)
        )

    @torch.compiler.disable
    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """`(B, C, H, W)` and `(B, D)` to `(B, C', H, W)`, as the block."""
        shortcut = inner(self.conv_shortcut)
        raw = shortcut if isinstance(shortcut, Int8Layer) else None
        codes, raw_codes = normed_codes(input_tensor, self.norm1, inner(self.conv1), silu=True, raw=raw)
        h = self._first(codes, temb)
        codes, _ = normed_codes(h, self.norm2, inner(self.conv2), silu=True)
        if raw is not None:
            residual = product(self.conv_shortcut, raw_codes)
        else:
            residual = input_tensor if shortcut is None else self.conv_shortcut(input_tensor)
        output = product(self.conv2, codes, residual)
        return output if self.output_scale_factor == 1 else output.div_(self.output_scale_factor)

    def _first(self, codes: Sequence[Tensor], temb: Tensor | None) -> Tensor:
        if temb is None:
            return product(self.conv1, codes)
        time = self._context.time
        if self._keeps_biases and time is not None and not _is_corrected(self.conv1):
            layer = inner(self.conv1)
            return layer.product(codes, self._bias(layer, temb, time))
        return product(self.conv1, codes).add_(self._projected(temb)[:, :, None, None])

    def _bias(self, layer: Int8Layer, temb: Tensor, time: float) -> Tensor:
        if time not in self._biases:
            projected = self._projected(temb[:1])[0]
            self._biases[time] = projected if layer.bias is None else projected + layer.bias
        return self._biases[time]

    def _projected(self, temb: Tensor) -> Tensor:
        projected: Tensor = self.time_emb_proj(temb if self.skip_time_act else functional.silu(temb))
        return projected


class FusedUpsample(nn.Module):
    """Stands in for an `Upsample2D` with an int8 convolution: repeats codes, not floats."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv: Int8Layer = block.conv

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Whether it is one that interpolates and then convolves."""
        return (
            isinstance(block, Upsample2D)
            and block.interpolate
            and block.norm is None
            and not block.use_conv_transpose
            and isinstance(getattr(block, "conv", None), Int8Layer)
        )

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, output_size: int | None = None) -> Tensor:
        """`(B, C, H, W)` to `(B, C', 2H, 2W)`, or to `output_size`."""
        size: dict[str, Any] = {"scale_factor": 2.0} if output_size is None else {"size": output_size}
        codes = self.conv.quantized(self.conv.split(hidden_states))
        repeated = [functional.interpolate(part, mode="nearest", **size) for part in codes]
        return self.conv.product(repeated, self.conv.bias)


class FusedDownsample(nn.Module):
    """Stands in for a `Downsample2D` with an int8 convolution behind asymmetric padding: pads codes."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.conv: Int8Layer = block.conv

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Whether it is one that pads by itself, on the right and below."""
        return (
            isinstance(block, Downsample2D)
            and block.use_conv
            and block.padding == 0
            and block.norm is None
            and isinstance(block.conv, Int8Layer)
        )

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C', H // 2, W // 2)`."""
        codes = self.conv.quantized(self.conv.split(hidden_states))
        padded = [
            functional.pad(part, (0, 1, 0, 1), value=zero_point)
            for part, (_, zero_point) in zip(codes, self.conv.quantizers(), strict=True)
        ]
        return self.conv.product(padded, self.conv.bias)


def inner(layer: Any) -> Any:
    """The layer whose output is corrected in cached calls, or the layer itself."""
    return layer.layer if isinstance(layer, CorrectedOutput) else layer


def _is_corrected(layer: nn.Module) -> bool:
    return isinstance(layer, CorrectedOutput) and layer.acts


def product(layer: Any, codes: Sequence[Tensor], added: Tensor | None = None) -> Tensor:
    """The layer on the codes of its parts, corrected where that is due, plus `added`; free to be changed."""
    quantized: Int8Layer = inner(layer)
    if not _is_corrected(layer):
        return quantized.product(codes, quantized.bias, added)
    output: Tensor = layer.corrected(quantized.product(codes, quantized.bias))
    return output if added is None else output.add_(added)
