"""Weight formats: how the codes of a quantized layer are stored, and which stored bytes are valid.

A recipe and an artifact name a format by its number of bits. Whatever packs, unpacks, counts or checks codes
asks the registry, so that a new format is one `register_weight_format` call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errata.runtime.bit_strings import bit_string_fault, group_sizes, int8_fault
from errata.runtime.bit_strings import packed_bytes as packed_bytes

_BYTE = 8
# Numbers of codes that a new format is tried with: none, one, and counts around whole bytes.
_TRIED_COUNTS = (0, 1, 2, 3, 4, 5, 7, 8, 9)


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How the signed, symmetric codes of one layer's weight are stored.

    Codes lie in `[-limit, limit]`; the most negative number of `bits` bits is not one of them.

    Attributes:
        name: for reports, such as `int4`.
        bits: of one code, 2 to 8; recipes and artifacts name the format by it.
        dtype: of the stored tensor: int8 where it is the codes themselves, else uint8.
        stored_shape: shape of the stored tensor, from that of the weight.
        pack: the stored tensor, from int8 codes of any shape. It raises ValueError if a code does not fit.
        unpack: int8 codes, from the stored tensor and the shape of the weight.
        fault: what is wrong with a stored tensor of that many codes, in a few words; empty if nothing is.
    """

    name: str
    bits: int
    dtype: torch.dtype
    stored_shape: Callable[[Sequence[int]], tuple[int, ...]]
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, torch.Size], Tensor]
    fault: Callable[[Tensor, int], str]

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= _BYTE:
            raise ValueError(f"weight format {self.name!r} has bits={self.bits!r}; allowed are 2 to 8")
        if self.dtype not in (torch.int8, torch.uint8):
            raise ValueError(
                f"weight format {self.name!r} is stored as {self.dtype}; allowed are int8 and uint8"
            )

    @property
    def limit(self) -> int:
        """The largest code; its negative is the smallest."""
        return 2 ** (self.bits - 1) - 1

    @property
    def is_packed(self) -> bool:
        """Whether the stored tensor has to be unpacked before an int8 kernel can read it."""
        return self.dtype is not torch.int8

    def stored_bytes(self, shape: Sequence[int]) -> int:
        """Return how many bytes the codes of a weight of that shape take."""
        return math.prod(self.stored_shape(shape)) * self.dtype.itemsize


_FORMATS: dict[int, WeightFormat] = {}


def register_weight_format(weight_format: WeightFormat) -> WeightFormat:
    """Add a format, after trying that it gives back what it is given; return it.

    Raises:
        ValueError: there is one of as many bits already, or packing, unpacking and checking disagree.
    """
    if weight_format.bits in _FORMATS:
        raise ValueError(
            f"weight format {weight_format.name!r} has {weight_format.bits} bits, as "
            f"{_FORMATS[weight_format.bits].name!r} has; register one format for each number of bits"
        )
    for count in _TRIED_COUNTS:
        _check_round_trip(weight_format, count)
    _FORMATS[weight_format.bits] = weight_format
    return weight_format


def weight_format(bits: int) -> WeightFormat:
    """Return the format of that many bits.

    Raises:
        ValueError: there is none.
    """
    if not is_weight_bits(bits):
        raise ValueError(f"no weight format has {str(bits)[:40]} bits; allowed are {allowed_weight_bits()}")
    return _FORMATS[bits]


def is_weight_bits(bits: object) -> bool:
    """Return whether there is a format of that many bits."""
    return type(bits) is int and bits in _FORMATS


def weight_bits() -> tuple[int, ...]:
    """Return the bits of all formats, widest first."""
    return tuple(sorted(_FORMATS, reverse=True))


def allowed_weight_bits(conjunction: str = "and") -> str:
    """Return the bits of all formats as text, such as `4, 6 and 8`."""
    *others, last = sorted(_FORMATS)
    return f"{', '.join(map(str, others))} {conjunction} {last}" if others else str(last)


def bit_string_format(bits: int) -> WeightFormat:
    """Return the format `int<bits>` whose codes follow each other as a string of bits.

    Code `i`, in row-major order and two's complement, takes bits `bits · i` to `bits · i + bits - 1`; bit `j`
    is bit `j mod 8`, from the low end, of byte `j // 8`. Bits that are left over in the last byte are 0. So
    two codes of 4 bits share a byte, and four codes of 6 bits share three.
    """
    return WeightFormat(
        name=f"int{bits}",
        bits=bits,
        dtype=torch.uint8,
        stored_shape=lambda shape: (packed_bytes(math.prod(shape), bits=bits),),
        pack=functools.partial(pack_bits, bits=bits),
        unpack=functools.partial(unpack_bits, bits=bits),
        fault=functools.partial(_bit_string_fault, bits=bits),
    )


def pack_bits(codes: Tensor, *, bits: int) -> Tensor:
    """Return codes as a string of bits, see `bit_string_format`.

    Args:
        codes: int8, any shape; the most negative number of `bits` bits is packed too.
        bits: of a code.

    Returns:
        uint8, `(ceil(bits * n / 8),)`.

    Raises:
        ValueError: a code does not fit.
    """
    flat, low = codes.flatten(), -(2 ** (bits - 1))
    if flat.numel() and (int(flat.min()) < low or int(flat.max()) > ~low):
        raise ValueError(
            f"codes lie in [{int(flat.min())}, {int(flat.max())}]; {bits} bits hold [{low}, {~low}]"
        )
    size, group_bytes = group_sizes(bits)
    unsigned = flat.contiguous().view(torch.uint8) & (2**bits - 1)
    groups = functional.pad(unsigned, (0, -len(flat) % size)).view(-1, size)
    packed = []
    for byte in range(group_bytes):
        shifts = ((code, bits * code - _BYTE * byte) for code in range(size))
        parts = [_shifted(groups[:, code], by) for code, by in shifts if -bits < by < _BYTE]
        packed.append(functools.reduce(torch.bitwise_or, parts))
    return torch.stack(packed, dim=1).flatten()[: packed_bytes(len(flat), bits=bits)].contiguous()


def unpack_bits(packed: Tensor, shape: torch.Size, *, bits: int) -> Tensor:
    """Return int8 codes of the given shape: the inverse of `pack_bits`."""
    flat = torch.stack(_unsigned(packed, bits), dim=1).flatten()[: shape.numel()]
    sign = 2 ** (bits - 1)
    # Two's complement of fewer bits: flipping the sign bit and taking it off again spreads it.
    return (flat.view(torch.int8) ^ sign).sub_(sign).reshape(shape)


def _unsigned(packed: Tensor, bits: int) -> list[Tensor]:
    """Return the codes without their sign, uint8: the first of every group, the second of every group, …"""
    size, group_bytes = group_sizes(bits)
    groups = functional.pad(packed, (0, -len(packed) % group_bytes)).view(-1, group_bytes)
    codes = []
    for code in range(size):
        byte, start = divmod(bits * code, _BYTE)
        found = groups[:, byte] >> start
        if start + bits > _BYTE:
            found = found | (groups[:, byte + 1] << (_BYTE - start))
        codes.append(found & (2**bits - 1))
    return codes


def _shifted(x: Tensor, by: int) -> Tensor:
    return x << by if by >= 0 else x >> -by


def _bit_string_fault(stored: Tensor, count: int, *, bits: int) -> str:
    return bit_string_fault(stored.numpy(), count, bits=bits)


def _int8_fault(stored: Tensor, count: int) -> str:
    return int8_fault(stored.numpy())


def _check_round_trip(weight_format: WeightFormat, count: int) -> None:
    limit = weight_format.limit
    codes = (torch.arange(count) % (2 * limit + 1) - limit).to(torch.int8)
    stored = weight_format.pack(codes)
    if stored.dtype is not weight_format.dtype or tuple(stored.shape) != weight_format.stored_shape((count,)):
        raise ValueError(
            f"weight format {weight_format.name!r} packs {count} codes to {stored.dtype} "
            f"{list(stored.shape)}, but says {weight_format.dtype} {weight_format.stored_shape((count,))}"
        )
    if not torch.equal(weight_format.unpack(stored, codes.shape), codes):
        raise ValueError(
            f"weight format {weight_format.name!r} does not give {count} codes back: unpack must undo pack"
        )
    if fault := weight_format.fault(stored, count):
        raise ValueError(
            f"weight format {weight_format.name!r} reports a fault in codes that it packed: {fault}"
        )


INT8 = register_weight_format(
    WeightFormat(
        name="int8",
        bits=8,
        dtype=torch.int8,
        stored_shape=lambda shape: tuple(shape),
        pack=lambda codes: codes,
        unpack=lambda stored, shape: stored.reshape(shape),
        fault=_int8_fault,
    )
)
INT6 = register_weight_format(bit_string_format(6))
INT4 = register_weight_format(bit_string_format(4))
