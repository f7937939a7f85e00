import pytest
import torch
from torchao.quantization.quant_primitives import dequantize_affine

from errata.deploy.reference import dequantize_weight


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
