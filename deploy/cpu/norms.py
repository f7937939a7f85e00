"""Normalization, activation and quantization between two int8 products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from errata.deploy.cpu import native
from errata.deploy.cpu.int8 import Int8Layer, codes_of, distinct


def normed_codes(
    x: Tensor, norm: nn.GroupNorm, layer: Int8Layer, *, silu: bool, raw: Int8Layer | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the codes that `layer` and `raw` read, one tensor for each part of their input.

    `layer` reads `x`, `(B, C, H, W)`, normalized and, with `silu`, activated. `raw`, a layer with the same
    parts such as the shortcut, reads `x` as it is; its list is empty if there is none.
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


def normed_codes_of_each(x: Tensor, norm: nn.GroupNorm, layers: Sequence[Int8Layer]) -> list[Tensor]:
    """Return what each of the layers, whose input has one part, reads of normalized `x` `(B, C, H, W)`."""
    quantizers, places = distinct([layer.quantizers()[0] for layer in layers])
    if native.obstacle():
        normed = norm(x)
        codes = [codes_of(normed, quantizer) for quantizer in quantizers]
    else:
        widths, starts = [x.shape[1]] * len(quantizers), [0] * len(quantizers)
        codes, _ = native.norm_quantize(x, norm, quantizers, widths, silu=False, starts=starts)
    return [codes[place] for place in places]


def layer_normed_codes(
    x: Tensor, norm: nn.LayerNorm, quantizers: Sequence[tuple[float, int]]
) -> list[Tensor]:
    """Return the codes of layer-normalized `x`, `(…, C)`, for each quantizer, once if they are equal."""
    wanted, places = distinct(quantizers)
    if native.obstacle() or norm.weight is None or norm.bias is None:
        normed = norm(x)
        codes = [codes_of(normed, quantizer) for quantizer in wanted]
    else:
        codes = native.layer_norm_quantize(x, norm, wanted)
    return [codes[place] for place in places]
