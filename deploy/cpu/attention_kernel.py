"""Attention in errata's own C code, in bfloat16 where the CPU multiplies it, else in float32."""

from __future__ import annotations

import ctypes
import enum

import torch
from torch import Tensor

from errata.deploy.cpu import native, recording
from errata.deploy.cpu.instructions import Operation
from errata.deploy.cpu.library import library, obstacle


class AttentionKind(enum.IntEnum):
    """How `attention` multiplies, as in the C source."""

    VECTORS = 0
    TILES = 1
    FLOATS = 2

    @property
    def dtype(self) -> torch.dtype:
        """What is multiplied; sums are float32."""
        return torch.float32 if self is AttentionKind.FLOATS else torch.bfloat16

    @property
    def description(self) -> str:
        """For reports."""
        return {
            AttentionKind.VECTORS: "in bfloat16 by vectors",
            AttentionKind.TILES: "in bfloat16 by tiles",
            AttentionKind.FLOATS: "in float32 by vectors",
        }[self]


FASTEST_FIRST = (AttentionKind.TILES, AttentionKind.VECTORS, AttentionKind.FLOATS)


def attention_kinds() -> tuple[AttentionKind, ...]:
    """Return the ways that this CPU has, the fastest first; none without AVX2 or NEON, or a compiler."""
    if obstacle():
        return ()
    there = {kind: bool(library().errata_has_attention(kind)) for kind in AttentionKind}
    there[AttentionKind.TILES] &= native.has_tiles()
    return tuple(kind for kind in FASTEST_FIRST if there[kind])


class _Attention(ctypes.Structure):
    """As in the C source, which describes the fields."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "width")),
        *((name, ctypes.c_int64) for name in ("mask_head", "mask_query")),
        *((name, ctypes.c_float) for name in ("scale", "out_scale")),
        *((name, ctypes.c_int32) for name in ("out_zero_point", "has_codes", "is_bfloat16", "kind")),
    ]


WIDEST_HEAD = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    scale: float,
    mask: Tensor | None = None,
    codes: tuple[float, int] | None = None,
    kind: AttentionKind | None = None,
) -> Tensor:
    """Return attention over packed heads.

    Args:
        query: `(B, L, heads x width)`, float32 or bfloat16; width at most `WIDEST_HEAD`.
        key: `(B, K, heads x width)`.
        value: likewise.
        heads: their number.
        scale: of the scores.
        mask: added to the scores, `(B x heads, 1 or L, K)`, float32.
        codes: scale and zero point of the codes to return in place of numbers.
        kind: how to multiply; None is the fastest.

    Returns:
        `(B, L, heads x width)`, float32, or uint8 codes.

    Raises:
        ValueError: shapes that do not fit each other, or heads that are too wide; the C code trusts them.
    """
    batch, queries, channels = query.shape
    if key.shape != value.shape or key.shape[::2] != query.shape[::2]:
        raise ValueError(f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}")
    if channels % heads or channels // heads > WIDEST_HEAD:
        raise ValueError(f"{channels} channels in {heads} heads; heads have at most {WIDEST_HEAD}, all alike")
    dtype = torch.bfloat16 if query.dtype is key.dtype is value.dtype is torch.bfloat16 else torch.float32
    query, key, value = (x.to(dtype).contiguous() for x in (query, key, value))
    keys = key.shape[1]
    if mask is not None:
        fitting = [(rows, keys) for rows in (1, queries)]
        if mask.ndim != 3 or tuple(mask.shape[1:]) not in fitting or mask.shape[0] not in (1, batch * heads):
            raise ValueError(
                f"mask {tuple(mask.shape)} for {batch} x {heads} heads, {queries} x {keys} scores"
            )
        mask = mask.float().expand(batch * heads, -1, keys)
        mask = mask if mask.stride(2) == 1 else mask.contiguous()
    kind = attention_kinds()[0] if kind is None else kind
    out = recording.empty(query.shape, torch.float32 if codes is None else torch.uint8)
    out_scale, zero_point = codes or (1.0, 0)
    of = _Attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), None if mask is None else mask.data_ptr(),
        out.data_ptr(), batch, heads, queries, keys, channels // heads, *_steps(mask), scale, out_scale,
        zero_point, codes is not None, dtype is torch.bfloat16, kind,
    )  # fmt: skip
    varying = [] if codes is None else native.varying_fields(of, codes, ("out_scale", "out_zero_point"))
    reads = [query, key, value, *([] if mask is None else [mask])]
    native.call(Operation.ATTENTION, of, reads, [out], varying=varying)
    return out


def _steps(mask: Tensor | None) -> tuple[int, int]:
    """Return the steps from one head and from one query of a mask to the next, 0 where all share it."""
    return (0, 0) if mask is None else (mask.stride(0), mask.stride(1) if mask.shape[1] > 1 else 0)
