"""Layers with low-bit weights and float inputs: the time embedding's, small and seldom called."""

from __future__ import annotations

from torch import Tensor, nn

from errata.deploy.packing import dequantize_weight
from errata.runtime.layers import Geometry
from errata.runtime.scheme import LayerScheme


class WeightOnlyLayer(nn.Module):
    """Keeps the codes and dequantizes them at each call, with the very result of dequantizing them at load.

    In memory a quarter of that; such a layer has few rows, so it costs microseconds.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.codes: Tensor
        self.weight_scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("codes", codes.clone())  # what is loaded is mapped from a file
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Same shapes as the float layer."""
        weight = dequantize_weight(self.codes, self.weight_scale, self.scheme.input_widths)
        return self.geometry.apply(x, weight, self.bias)
