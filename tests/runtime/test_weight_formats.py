"""Codes come back from what is stored, stored bytes are those of the format page, and no others are taken."""

import dataclasses
import math

import pytest
import torch

from errata.runtime import weight_bits, weight_formats
from errata.runtime.weight_formats import (
    WeightFormat,
    bit_string_format,
    pack_bits,
    packed_bytes,
    register_weight_format,
    unpack_bits,
    weight_format,
)

ALL_BITS = weight_formats.weight_bits()
PACKED = [bits for bits in ALL_BITS if bits < 8]


def test_the_formats_that_recipes_may_name() -> None:
    assert ALL_BITS == (8, 6, 4)
    assert weight_formats.allowed_weight_bits() == "4, 6 and 8"
    assert [weight_format(bits).name for bits in ALL_BITS] == ["int8", "int6", "int4"]
    assert [weight_format(bits).limit for bits in ALL_BITS] == [127, 31, 7]


def test_golden_bytes_of_four_bits() -> None:
    codes = torch.tensor([[1, -1, 7], [-7, 0, -8]], dtype=torch.int8)
    assert pack_bits(codes, bits=4).tolist() == [0xF1, 0x97, 0x80]
    assert pack_bits(codes.flatten()[:5], bits=4).tolist() == [0xF1, 0x97, 0x00]


def test_golden_bytes_of_six_bits() -> None:
    # 000001 111111 011111 100001, the last code first: 1000 0101 1111 1111 1100 0001
    codes = torch.tensor([[1, -1], [31, -31]], dtype=torch.int8)
    assert pack_bits(codes, bits=6).tolist() == [0b11000001, 0b11111111, 0b10000101]
    assert pack_bits(codes.flatten()[:1], bits=6).tolist() == [0b00000001]
    assert pack_bits(codes.flatten()[:3], bits=6).tolist() == [0b11000001, 0b11111111, 0b00000001]


@pytest.mark.parametrize("bits", range(2, 8))
def test_packing_is_one_large_binary_number(bits: int) -> None:
    """Every code at every place in a group, and every count around whole bytes, against Python's integers."""
    low, mask = -(2 ** (bits - 1)), 2**bits - 1
    whole = math.lcm(bits, 8) // bits
    each = torch.arange(low, -low, dtype=torch.int8)
    for place in range(whole):
        codes = torch.zeros(len(each), whole, dtype=torch.int8)
        codes[:, place] = each
        for count in {place + 1, whole}:
            for row in codes[:, :count]:
                number = sum((code & mask) << (bits * index) for index, code in enumerate(row.tolist()))
                packed = pack_bits(row, bits=bits)
                assert bytes(packed.tolist()) == number.to_bytes(packed_bytes(count, bits=bits), "little")
                assert torch.equal(unpack_bits(packed, row.shape, bits=bits), row)


def test_every_group_of_four_bits_comes_back() -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    codes = unpack_bits(packed, torch.Size([512]), bits=4)
    assert torch.equal(pack_bits(codes, bits=4), packed)


def test_every_group_of_six_bits_comes_back() -> None:
    """All 2^24 of them, in eight parts."""
    for part in range(8):
        numbers = torch.arange(part << 21, (part + 1) << 21, dtype=torch.int32)
        packed = torch.stack([numbers >> shift & 255 for shift in (0, 8, 16)], dim=1)
        packed = packed.to(torch.uint8).flatten()
        codes = unpack_bits(packed, torch.Size([4 << 21]), bits=6)
        assert torch.equal(pack_bits(codes, bits=6), packed)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(16,), (3, 5), (7, 3, 3, 3), (0, 4)])
def test_round_trip_is_exact(bits: int, shape: tuple[int, ...]) -> None:
    stored_as = weight_format(bits)
    codes = torch.randint(-stored_as.limit, stored_as.limit + 1, shape, dtype=torch.int8)
    stored = stored_as.pack(codes)
    assert (stored.dtype, tuple(stored.shape)) == (stored_as.dtype, stored_as.stored_shape(shape))
    assert stored.nbytes == stored_as.stored_bytes(shape) == -(-codes.numel() * bits // 8)
    assert torch.equal(stored_as.unpack(stored, codes.shape), codes)
    assert stored_as.fault(stored, codes.numel()) == ""


def test_a_view_is_packed_by_its_own_order() -> None:
    codes = torch.randint(-31, 32, (6, 4), dtype=torch.int8)
    assert torch.equal(pack_bits(codes.T, bits=6), pack_bits(codes.T.contiguous(), bits=6))


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("beyond", [False, True])
def test_codes_that_do_not_fit_are_refused(bits: int, beyond: bool) -> None:
    low = -(2 ** (bits - 1))
    with pytest.raises(ValueError, match=rf"{bits} bits hold \[{low}, {~low}\]"):
        pack_bits(torch.tensor([-low if beyond else low - 1, 0], dtype=torch.int8), bits=bits)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("place", range(5))
def test_the_most_negative_number_is_no_code(bits: int, place: int) -> None:
    codes = torch.zeros(5, dtype=torch.int8)
    codes[place] = -(2 ** (bits - 1))
    assert weight_format(bits).fault(weight_format(bits).pack(codes), 5) == (
        "holds a code outside the symmetric range"
    )


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize("count", range(1, 9))
def test_left_over_bits_must_be_zero(bits: int, count: int) -> None:
    stored_as = weight_format(bits)
    stored = stored_as.pack(torch.ones(count, dtype=torch.int8))
    for bit in range(8):
        altered = stored.clone()
        altered[-1] ^= 1 << bit
        is_left_over = 8 * len(stored) - bits * count >= 8 - bit
        fault = stored_as.fault(altered, count)
        assert (fault == "does not fill its last byte up with 0") == is_left_over, bit


def test_unknown_widths_are_refused() -> None:
    for bits in (5, 3, 8.0, True, "8"):
        with pytest.raises(ValueError, match="no weight format has .* bits; allowed are 4, 6 and 8"):
            weight_format(bits)  # type: ignore[arg-type]


def test_a_format_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_formats, "_FORMATS", dict(weight_formats._FORMATS))
    register_weight_format(bit_string_format(5))
    assert weight_formats.allowed_weight_bits("or") == "4, 5, 6 or 8"
    assert weight_format(5).stored_bytes((3, 3)) == 6
    with pytest.raises(ValueError, match="'int5' has 5 bits, as 'int5' has; register one"):
        register_weight_format(bit_string_format(5))


def _other(**changes: object) -> WeightFormat:
    return dataclasses.replace(bit_string_format(3), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "has bits=9; allowed are 2 to 8"),
        ({"bits": True}, "has bits=True; allowed are 2 to 8"),
        ({"dtype": torch.int16}, "is stored as torch.int16; allowed are int8 and uint8"),
        ({"stored_shape": lambda shape: (7,)}, r"packs 0 codes to torch.uint8 \[0\], but says"),
        ({"unpack": lambda stored, shape: torch.zeros(shape).char()}, "does not give 1 codes back"),
        ({"fault": lambda stored, count: "is odd"}, "reports a fault in codes that it packed: is odd"),
    ],
)
def test_formats_that_contradict_themselves_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_weight_format(_other(**changes))


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", [(3, 3), (5, 2, 3, 3), (1, 1)])
def test_what_is_known_without_torch_is_what_the_registry_says(bits: int, shape: tuple[int, ...]) -> None:
    stored_as = weight_format(bits)
    kind = {torch.int8: "I8", torch.uint8: "U8"}[stored_as.dtype]
    assert weight_bits.stored_type(bits, shape) == (kind, stored_as.stored_shape(shape))
    codes = torch.randint(-stored_as.limit, stored_as.limit + 1, shape, dtype=torch.int8)
    stored = stored_as.pack(codes)
    assert weight_bits.fault_of(stored.numpy(), codes.numel(), bits=bits) == ""
    codes.view(-1)[-1] = -(2 ** (bits - 1))
    fault = weight_bits.fault_of(stored_as.pack(codes).numpy(), codes.numel(), bits=bits)
    assert fault == "holds a code outside the symmetric range"


def test_the_registry_is_asked_about_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weight_bits.OWN_BITS == ALL_BITS
    assert all(map(weight_bits.is_weight_bits, ALL_BITS))
    assert not any(map(weight_bits.is_weight_bits, (5, 8.0, True, "8")))
    monkeypatch.setattr(weight_formats, "_FORMATS", dict(weight_formats._FORMATS))
    register_weight_format(bit_string_format(5))
    assert weight_bits.is_weight_bits(5)
    assert weight_bits.stored_type(5, (3, 3)) == ("U8", (6,))
    stored = pack_bits(torch.full((2,), -16, dtype=torch.int8), bits=5).numpy()
    assert weight_bits.fault_of(stored, 2, bits=5) == "holds a code outside the symmetric range"
