import torch

from errata.deploy.reference import dequantize_weight


def test_parts_have_scales_of_their_own() -> None:
    codes = torch.randint(-127, 128, (4, 6, 3, 3), dtype=torch.int8)
    scales = torch.rand(2, 4)
    weight = dequantize_weight(codes, scales, (2, 4))
    assert torch.equal(weight[:, :2], codes[:, :2] * scales[0, :, None, None, None])
    assert torch.equal(weight[:, 2:], codes[:, 2:] * scales[1, :, None, None, None])
