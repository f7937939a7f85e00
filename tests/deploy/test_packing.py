import pytest
import torch
from torchao.quantization.quant_primitives import dequantize_affine

from errata.deploy.packing import dequantize_weight, pack_int4, packed_bytes, unpack_int4


def test_golden_bytes() -> None:
    codes = torch.tensor([[1, -1, 7], [-7, 0, -8]], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [0xF1, 0x97, 0x80]
    assert pack_int4(codes.flatten()[:5]).tolist() == [0xF1, 0x97, 0x00]


@pytest.mark.parametrize("shape", [(16,), (3, 5), (7, 3, 3, 3)])
def test_round_trip_is_exact(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype is torch.uint8
    assert packed.numel() == packed_bytes(codes.numel())
    assert torch.equal(unpack_int4(packed, codes.shape), codes)


@pytest.mark.parametrize("value", [-9, 8])
def test_codes_that_do_not_fit_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"four bits hold \[-8, 7\]"):
        pack_int4(torch.tensor([value, 0], dtype=torch.int8))


def test_parts_have_scales_of_their_own() -> None:
    codes = torch.randint(-127, 128, (4, 6, 3, 3), dtype=torch.int8)
    scales = torch.rand(2, 4)
    weight = dequantize_weight(codes, scales, (2, 4))
    assert torch.equal(weight[:, :2], codes[:, :2] * scales[0, :, None, None, None])
    assert torch.equal(weight[:, 2:], codes[:, 2:] * scales[1, :, None, None, None])


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3, 3)])
def test_the_reals_are_those_of_torchao(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    scale = torch.rand(4)
    expected = dequantize_affine(codes, (1, *shape[1:]), scale, None, torch.int8, output_dtype=torch.float32)
    assert torch.equal(dequantize_weight(codes, scale[None], (6,)), expected)
