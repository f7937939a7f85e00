"""Convolution and linear layers of a UNet: find one, replace it, and what it does besides its weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Geometry:
    """What a convolution or linear layer does besides its weight; reads a module, computes in float."""

    def __init__(self, module: nn.Conv2d | nn.Linear) -> None:
        self.is_conv = isinstance(module, nn.Conv2d)
        self.stride: Any = getattr(module, "stride", None)
        self.padding: Any = getattr(module, "padding", None)
        self.dilation: Any = getattr(module, "dilation", None)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the float layer."""
        if not self.is_conv:
            return functional.linear(x, weight, bias)
        return functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def split(self, x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the parts of an input, along its channels."""
        return x.split(list(widths), dim=1 if self.is_conv else -1)

    def quantize_parts(
        self, x: Tensor, widths: Sequence[int], quantizers: Iterable[Callable[[Tensor], Tensor]]
    ) -> Tensor:
        """Return `x` with each part passed through its own quantizer."""
        parts = zip(quantizers, self.split(x, widths), strict=True)
        return self.join([quantize(part) for quantize, part in parts])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Join parts that `split` made."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1 if self.is_conv else -1)


def per_output_channel(scale: Tensor, ndim: int) -> Tensor:
    """Return a scale `(O,)` shaped to multiply a weight of `ndim` dimensions."""
    return scale.reshape(-1, *([1] * (ndim - 1)))


def float_layer(unet: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    """Return the convolution or linear layer of that name.

    Raises:
        AttributeError: there is no such layer.
    """
    module = unet.get_submodule(name)
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise AttributeError(f"{name!r} is a {type(module).__name__}, not a convolution or linear layer")
    return module


def replace_module(unet: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the layer of that name, in `unet` itself."""
    parent_name, _, child = name.rpartition(".")
    setattr(unet.get_submodule(parent_name), child, module)
