"""Weight codes of one part of a layer, in the order in which the kernels read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from errata.deploy.cuda.exact import Exact

# Codes that the int4 kernel takes at a time, and how many bytes they are.
GROUP = 64
GROUP_BYTES = GROUP // 2


class PartWeight(Exact):
    """The weight codes of one part of an input.

    Buffers: `codes`, int8, `(O, taps, C)`, or int4 in groups, `(O, taps, groups, 32)`; `column_sum`, int32,
    `(O,)`, the sum of the codes of an output channel; `scale`, float32, `(O,)`.

    Args:
        codes: int8, `(O, C)` or `(O, C, kh, kw)`.
        scale: `(O,)`.
        bits: of the codes. Widths in `PACKED_LAYOUTS` stay packed on the device; all others are int8 there.
    """

    def __init__(self, codes: Tensor, scale: Tensor, *, bits: int) -> None:
        super().__init__()
        self.codes: Tensor
        self.column_sum: Tensor
        self.scale: Tensor
        self.bits = bits
        self.channels = codes.shape[1]
        by_tap = codes.flatten(2).transpose(1, 2) if codes.ndim == 4 else codes[:, None, :]
        layout = PACKED_LAYOUTS.get(bits)
        self.register_buffer("codes", by_tap.contiguous() if layout is None else layout[0](by_tap))
        self.register_buffer("column_sum", by_tap.sum(dim=(1, 2), dtype=torch.int32))
        self.register_buffer("scale", scale.float().contiguous())

    def unpacked(self) -> Tensor:
        """Return the codes, int8, `(O, taps, C)`; the buffer itself where it is that already."""
        layout = PACKED_LAYOUTS.get(self.bits)
        return self.codes if layout is None else layout[1](self.codes, self.channels)

    @property
    def is_packed(self) -> bool:
        """Whether the kernel has to unpack the codes."""
        return self.bits in PACKED_LAYOUTS


def pack_groups(codes: Tensor) -> Tensor:
    """Return four-bit codes `(O, taps, C)` two to a byte, as the kernel unpacks them without moving any.

    Channels are filled up with zeros to groups of 64. Byte `j` of a group holds code `j` in the low nibble
    and code `j + 32` in the high one: so each half of a group is a tile of its own.

    Returns:
        int8, `(O, taps, groups, 32)`.
    """
    filled = functional.pad(codes, (0, -codes.shape[-1] % GROUP))
    low, high = filled.unflatten(-1, (-1, 2, GROUP_BYTES)).view(torch.uint8).unbind(dim=-2)
    return ((low & 0xF) | (high << 4)).contiguous().view(torch.int8)


def unpack_groups(packed: Tensor, channels: int) -> Tensor:
    """Return the codes that `pack_groups` packed, int8, `(O, taps, channels)`."""
    low, high = (packed << 4) >> 4, packed >> 4
    return torch.stack([low, high], dim=-2).flatten(2)[..., :channels].contiguous()


# By bits: how the kernel wants the codes, and how they come back. It can unpack no other width.
PACKED_LAYOUTS: Mapping[int, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, int], Tensor]]] = {
    4: (pack_groups, unpack_groups)
}
