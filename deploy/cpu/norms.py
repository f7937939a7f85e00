"""Group normalization, activation and quantization between two int8 products."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from errata.deploy.cpu import native
from errata.deploy.cpu.int8 import OneDNNLayer


def normed_codes(
    x: Tensor, norm: nn.GroupNorm, layer: OneDNNLayer, *, silu: bool, raw: OneDNNLayer | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """What `layer` reads: the codes of normalized and, with `silu`, activated `x` `(B, C, H, W)`, by part.

    And what `raw`, a layer with the same parts, reads of `x` itself; empty without one.
    """
    widths = layer.scheme.input_widths
    if not native.obstacle():
        raw_quantizers = [] if raw is None else raw.quantizers()
        return native.norm_quantize(x, norm, layer.quantizers(), widths, silu=silu, raw=raw_quantizers)
    parts = norm(x).split(list(widths), dim=1)
    if silu:
        # Of a part, a dense result: no pass is needed to copy the part out of the whole.
        parts = tuple(functional.silu(part, inplace=len(parts) == 1) for part in parts)
    return layer.quantized(parts), [] if raw is None else raw.quantized(x.split(list(widths), dim=1))
