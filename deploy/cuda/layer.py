"""Convolution or linear layer on int8 kernels of a CUDA device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from errata.deploy.cuda.candidates import Part
from errata.deploy.cuda.operators import LARGEST_PRODUCT, LARGEST_SUM
from errata.deploy.cuda.products import Product
from errata.deploy.cuda.selection import LayerShape, Selection
from errata.deploy.cuda.tables import DeviceStepTable
from errata.deploy.cuda.weights import PartWeight
from errata.deploy.cuda.window import Window
from errata.runtime.layers import Geometry
from errata.runtime.scheme import LayerScheme


class CudaLayer(nn.Module):
    """Convolution or linear layer; `selection` names the way to compute each part of its input.

    A split input is one product a part; the later ones are added in the kernel to the first, which stays in
    float32. Output in the input's dtype; channels_last from a convolution.

    Args:
        scheme: how the layer is quantized.
        geometry: what it does besides its weight.
        codes: int8, `(O, I)` or `(O, I, kh, kw)`.
        weight_scale: float32, `(P, O)`.
        bias: float32, `(O,)`, or None.
        tables: scale and zero point by step, one for each part.
        selection: picks the way for a shape.

    Raises:
        ValueError: sums could exceed 32 bits; or see `Window.of`.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        tables: Sequence[DeviceStepTable],
        selection: Selection,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.window = Window.of(geometry, (codes.shape[2], codes.shape[3]) if geometry.is_conv else (1, 1))
        self.selection = selection
        self.tables = nn.ModuleList(tables)
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self.out_channels = codes.shape[0]
        parts = codes.split(list(scheme.input_widths), dim=1)
        _check_sums(scheme, max(part[0].numel() for part in parts))
        self.weights = nn.ModuleList(
            PartWeight(part, scale, bits=scheme.weight_bits)
            for part, scale in zip(parts, weight_scale, strict=True)
        )
        # One list of products for each way that was picked for some shape.
        self.products = nn.ModuleDict()
        for name in selection.prepared:
            self.prepare(name)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the output, shaped as the float layer's; the kernel adds `residual`, of its shape."""
        parts = [self._pixels(part) for part in self.geometry.split(x, self.scheme.input_widths)]
        added = None if residual is None else self._pixels(residual).contiguous()
        name = self.selection.pick(self, LayerShape.of(self, parts, x, added), parts, added)
        output = self.compute(name, parts, added)
        if self.geometry.is_conv:
            return output.permute(0, 3, 1, 2)
        return output.reshape(*x.shape[:-1], self.out_channels)

    def compute(self, name: str, parts: Sequence[Tensor], residual: Tensor | None) -> Tensor:
        """Return the layer in the way of that name, on pixels `(B, H, W, C)`, one tensor for each part."""
        if name not in self.products:
            self.prepare(name)
        products = cast(Sequence[Product], self.products[name])
        sum_so_far = residual
        for product, part in list(zip(products, parts, strict=True))[:-1]:
            sum_so_far = product(part, sum_so_far, torch.float32)
        return products[-1](parts[-1], sum_so_far, parts[-1].dtype)

    def prepare(self, name: str) -> None:
        """Make what that way needs, such as another layout of the weight."""
        bias: list[Tensor | None] = [self.bias, *[None] * (len(self.weights) - 1)]
        made = [
            Part(cast(PartWeight, weight), first, cast(DeviceStepTable, table)).product(name, self.window)
            for weight, first, table in zip(self.weights, bias, self.tables, strict=True)
        ]
        self.products[name] = nn.ModuleList(made)

    def drop_all_but(self, names: set[str]) -> None:
        """Free what the other ways need."""
        for name in set(self.products) - names:
            del self.products[name]

    def _pixels(self, x: Tensor) -> Tensor:
        """Return a view `(B, H, W, C)`; rows of a linear layer are images of one pixel."""
        return x.permute(0, 2, 3, 1) if self.geometry.is_conv else x.reshape(-1, 1, 1, x.shape[-1])


def _check_sums(scheme: LayerScheme, terms: int) -> None:
    if terms * LARGEST_PRODUCT > LARGEST_SUM:
        raise ValueError(
            f"layer {scheme.name!r} sums {terms} products; 32 bits hold {LARGEST_SUM // LARGEST_PRODUCT}"
        )
