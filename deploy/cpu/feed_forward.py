"""The feed-forward part of a transformer block between int8 layers: its wide middle is never in floats."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from errata.deploy.cpu.int8 import Int8Layer, codes_of, is_of_one_part
from errata.deploy.cpu.norms import layer_normed_codes
from errata.deploy.cpu.vnni import VNNIProduct, interleaving

# Vectors of outputs of the kernel hold so many values, and so many gates.
_TOGETHER = 32


class FusedFeedForward(nn.Module):
    """Stand-in for a `FeedForward` with GEGLU, whose layers it shares under the same names.

    The projection multiplies values and gates side by side, and gates and quantizes them as it writes.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.net = block.net
        self.net[0].proj = GatedProjection(block.net[0].proj)

    @staticmethod
    def is_fusible(block: nn.Module) -> bool:
        """Return whether both of its layers are int8 layers of one part, the first on errata's own kernel."""
        if not (isinstance(block, FeedForward) and len(block.net) == 3 and isinstance(block.net[0], GEGLU)):
            return False
        first, last = block.net[0].proj, block.net[2]
        return (
            is_of_one_part(first)
            and is_of_one_part(last)
            and isinstance(first.products[0], VNNIProduct)
            and first.products[0].outputs % _TOGETHER == 0
        )

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map `(B, L, C)` to `(B, L, C')`, as the block."""
        quantizer = self.net[0].proj.quantizer()
        return self._from_codes(codes_of(hidden_states, quantizer), None)

    def onto(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """Return `x + forward(norm(x))`."""
        (codes,) = layer_normed_codes(x, norm, [self.net[0].proj.quantizer()])
        return self._from_codes(codes, x)

    def _from_codes(self, codes: Tensor, added: Tensor | None) -> Tensor:
        projection, last = self.net[0].proj, self.net[2]
        (wanted,) = last.quantizers()
        output: Tensor = last.product([projection(codes, wanted)], last.bias, added)
        return output


class GatedProjection(nn.Module):
    """An int8 layer of values and their gates that returns gated codes."""

    def __init__(self, layer: Int8Layer) -> None:
        super().__init__()
        self.scheme = layer.scheme
        (self._table,), (product,) = layer.tables, layer.products
        assert isinstance(product, VNNIProduct)
        self._product = product.interleaved()
        order = interleaving(product.outputs)
        self.bias = None if layer.bias is None else layer.bias[order].contiguous()

    def quantizer(self) -> tuple[float, int]:
        """Return scale and zero point of the codes that it reads at the current step."""
        return self._table.now()

    def forward(self, codes: Tensor, wanted: tuple[float, int]) -> Tensor:
        """Return the codes of `value * GELU(gate)`, `(…, O / 2)`, with scale and zero point `wanted`."""
        return self._product.gated(codes, self.quantizer(), self.bias, wanted)
