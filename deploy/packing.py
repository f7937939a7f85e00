"""Weight codes as they are stored, and the reals that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.runtime.layers import per_output_channel


def packed_bytes(count: int) -> int:
    """Bytes that `count` four-bit codes take."""
    return (count + 1) // 2


def pack_int4(codes: Tensor) -> Tensor:
    """Four-bit codes, two to a byte.

    Args:
        codes: int8 in `[-8, 7]`, any shape.

    Returns:
        uint8, `(ceil(n / 2),)`: row-major order, the earlier code in the low nibble, two's complement; an odd
        count is filled up with zero.

    Raises:
        ValueError: a code does not fit four bits.
    """
    flat = codes.flatten()
    if flat.numel() and (int(flat.min()) < -8 or int(flat.max()) > 7):
        raise ValueError(f"codes lie in [{int(flat.min())}, {int(flat.max())}]; four bits hold [-8, 7]")
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    nibbles = flat.view(torch.uint8) & 0xF
    return (nibbles[0::2] | (nibbles[1::2] << 4)).contiguous()


def unpack_int4(packed: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `pack_int4`: int8 codes of the given shape."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=1).flatten()[: shape.numel()]
    signed = nibbles.to(torch.int8)
    return torch.where(signed > 7, signed - 16, signed).reshape(shape)


def has_code_out_of_range(stored: Tensor) -> bool:
    """Whether codes, int8 or packed uint8, hold the most negative number, which symmetric ones lack."""
    if stored.dtype is torch.int8:
        return bool((stored == -128).any())
    return bool((((stored & 0xF) == 8) | ((stored >> 4) == 8)).any())


def dequantize_weight(codes: Tensor, scales: Tensor, input_widths: tuple[int, ...]) -> Tensor:
    """Return the float32 weight that the codes stand for: each code times its output channel's scale.

    The simulation (`errata.compress.quantize.simulation`) takes it from torchao; both agree to the last bit.

    Args:
        codes: int8, `(O, I)` or `(O, I, kh, kw)`.
        scales: float32, `(P, O)`: one row for each part of the input.
        input_widths: input channels of each part.
    """
    parts = [
        part.float() * per_output_channel(scale, codes.ndim)
        for part, scale in zip(codes.split(list(input_widths), dim=1), scales, strict=True)
    ]
    return torch.cat(parts, dim=1).contiguous()
