"""The end of a network: normalization, SiLU and the last convolution as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from errata.deploy.cpu.int8 import Int8Layer
from errata.deploy.cpu.norms import normed_codes
from errata.deploy.cpu.resnet import inner, product


class FusedOutput(nn.Module):
    """Stands in for the last normalization and gives what the last convolution would; others pass it on."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.norm, self.conv = unet.conv_norm_out, unet.conv_out

    @staticmethod
    def is_fusible(unet: Any) -> bool:
        """Whether the network ends so, with an int8 convolution."""
        return (
            isinstance(getattr(unet, "conv_norm_out", None), nn.GroupNorm)
            and isinstance(getattr(unet, "conv_act", None), nn.SiLU)
            and isinstance(inner(getattr(unet, "conv_out", None)), Int8Layer)
        )

    @classmethod
    def into(cls, unet: Any) -> None:
        """Puts one into the network, in place."""
        unet.conv_norm_out, unet.conv_act, unet.conv_out = cls(unet), nn.Identity(), PassedOn(unet.conv_out)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C', H, W)`."""
        codes, _ = normed_codes(x, self.norm, inner(self.conv), silu=True)
        return product(self.conv, codes)


class PassedOn(nn.Module):
    """Stands in for the last convolution, which has been computed."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x
