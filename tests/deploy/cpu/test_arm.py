"""The C code for 64-bit ARM, on CPUs that qemu emulates: with and without dot products."""

from collections.abc import Iterator

import arm
import pytest
import torch
from torch import Tensor, nn

from errata.deploy.cpu import attention_kernel, library, native
from errata.deploy.cpu.int8 import quantize_to_uint8
from errata.deploy.cpu.vnni import VNNIProduct, interleaving
from errata.runtime.layers import Geometry

pytestmark = pytest.mark.skipif(bool(arm.MISSING), reason=arm.MISSING)
PRODUCT_NAMES = {"cortex-a57": "NEON smull", "neoverse-n1": "NEON sdot", "max": "NEON sudot"}


@pytest.fixture(scope="module", params=list(arm.FEATURES))
def emulated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[arm.EmulatedCPU]:
    program = arm.compiled(request.param, tmp_path_factory.mktemp("arm"))
    cpu = arm.EmulatedCPU(request.param, program)
    try:
        assert cpu.product_name() == PRODUCT_NAMES[request.param]
        assert cpu.attention_kinds() == (attention_kernel.AttentionKind.FLOATS,)
        with arm.instead(cpu):
            yield cpu
    finally:
        cpu.close()


CASES = [
    # Channels and outputs in sixteens, and not; pixels that do not fill the last tile.
    (nn.Linear(64, 64), (1, 64)),
    (nn.Linear(100, 39), (7, 100)),
    (nn.Linear(2304, 16), (13, 2304)),
    (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 9)),
    (nn.Conv2d(3, 20, 3, padding=1), (1, 3, 6, 5)),  # padded to four channels
    (nn.Conv2d(4, 13, 3, padding=1, stride=2), (1, 4, 5, 3)),
    (nn.Conv2d(20, 100, (3, 1), padding=(1, 0)), (3, 20, 5, 7)),
    (nn.Conv2d(12, 130, 5, padding=4, dilation=2, stride=(1, 2)), (2, 12, 11, 9)),
    (nn.Conv2d(32, 24, 1, padding=1), (2, 32, 5, 6)),
]


@pytest.mark.parametrize(("module", "shape"), CASES)
@pytest.mark.parametrize("zero_point", [0, 97, 255])
@pytest.mark.usefixtures("emulated")
def test_products_are_exact(module: nn.Conv2d | nn.Linear, shape: tuple[int, ...], zero_point: int) -> None:
    weight = torch.randint(-127, 128, module.weight.shape, dtype=torch.int8)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    weight[0] = -127
    codes.flatten()[: codes.numel() // 4] = 0  # the largest products of lowered codes
    product = VNNIProduct(Geometry(module), weight, torch.ones(len(weight)))
    x = torch.nn.functional.pad(codes, (0, 0, 0, 0, 0, -shape[1] % 4)) if codes.ndim == 4 else codes
    found = product(x, (1.0, zero_point), None, None, torch.float32)
    wanted = Geometry(module).apply(codes.double() - zero_point, weight.double(), None)
    assert wanted.abs().max() > 10_000
    assert torch.equal(found.double(), wanted.float().double())


@pytest.mark.usefixtures("emulated")
def test_outputs_are_scaled_added_to_and_rounded() -> None:
    module = nn.Conv2d(16, 39, 3, padding=1)
    weight = torch.randint(-127, 128, module.weight.shape, dtype=torch.int8)
    codes = torch.randint(0, 256, (2, 16, 5, 7), dtype=torch.uint8)
    scale, bias, added = torch.rand(39) * 0.01, torch.randn(39), torch.randn(2, 39, 5, 7)
    product = VNNIProduct(Geometry(module), weight, scale)
    found, half = (
        product(codes, (0.02, 90), bias, added, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    scaled = weight.double() * scale.double()[:, None, None, None]
    wanted = Geometry(module).apply((codes.double() - 90) * 0.02, scaled, bias.double()) + added
    bound = 2e-6 * wanted.abs().max()
    assert (found - wanted).abs().max() <= bound
    assert (found - wanted + added).abs().max() > 10 * bound  # what is left out would show
    assert torch.equal(half, found.bfloat16())


@pytest.mark.usefixtures("emulated")
def test_gated_outputs_are_codes() -> None:
    weight = torch.randint(-127, 128, (96, 40), dtype=torch.int8)
    codes = torch.randint(0, 256, (9, 40), dtype=torch.uint8)
    scale, bias = torch.full((96,), 0.001), torch.randn(96)
    product = VNNIProduct(Geometry(nn.Linear(40, 96)), weight, scale).interleaved()
    found = product.gated(codes, (0.02, 128), bias[interleaving(96)], (0.05, 60))
    y = (codes.double() - 128) * 0.02 @ (weight.double() * 0.001).T + bias
    value, gate = y.chunk(2, dim=-1)
    assert flips(found, quantized(value * nn.functional.gelu(gate), (0.05, 60))) <= 0.01
    assert (found != quantized(value * gate, (0.05, 60))).double().mean() > 0.1


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.usefixtures("emulated")
def test_normalized_codes(silu: bool) -> None:
    norm, x = nn.GroupNorm(4, 52), torch.randn(2, 52, 9, 9) * 3 + 1
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    norm.requires_grad_(False)
    quantizers, raw = [(0.02, 30), (0.05, 90)], [(0.04, 128), (0.1, 60)]
    codes, raw_codes = native.norm_quantize(x, norm, quantizers, (33, 19), silu=silu, raw=raw)
    y = norm.double()(x.double())
    y, other = (nn.functional.silu(y), y) if silu else (y, nn.functional.silu(y))
    norm.float()
    for found, part, wrong, quantizer in zip(
        codes, y.split((33, 19), 1), other.split((33, 19), 1), quantizers, strict=True
    ):
        assert flips(found, quantized(part, quantizer)) <= 1e-3
        assert (found != quantized(wrong, quantizer)).double().mean() > 0.01
    for found, part, quantizer in zip(raw_codes, x.split((33, 19), 1), raw, strict=True):
        assert flips(found, quantized(part.double(), quantizer)) <= 1e-3
    layer_norm, rows = nn.LayerNorm(44).requires_grad_(False), torch.randn(5, 44) * 2 + 1
    (found,) = native.layer_norm_quantize(rows, layer_norm, [(0.02, 120)])
    wanted = quantized(nn.functional.layer_norm(rows.double(), (44,)), (0.02, 120))
    assert flips(found, wanted) <= 0.005
    assert (found != quantized(rows.double(), (0.02, 120))).double().mean() > 0.05


@pytest.mark.usefixtures("emulated")
def test_what_is_no_number_has_the_code_zero() -> None:
    x = torch.full((3, 21), torch.nan)
    assert not native.quantize(x, (0.1, 50)).any()


@pytest.mark.usefixtures("emulated")
def test_elementwise_operations() -> None:
    image = torch.randn(2, 3, 5, 7)
    codes = native.quantize(image, (0.02, 110), padded=4)
    assert flips(codes[:, :3], quantized(image.double(), (0.02, 110))) <= 0.005
    assert bool((codes[:, 3] == 110).all())
    rows = torch.randn(9, 37)
    assert flips(native.quantize(rows, (0.02, 110)), quantized(rows.double(), (0.02, 110))) <= 0.005
    assert torch.equal(native.upsample(codes), codes.repeat_interleave(2, 2).repeat_interleave(2, 3))
    y, gain, shift, added = torch.randn(9, 37), torch.randn(37), torch.randn(37), torch.randn(9, 37)
    wanted = y.double() * gain + shift + added
    found = native.adjust(y, shift, gain=gain, added=added)
    assert (found - wanted).abs().max() <= 1e-5
    assert (found - added - wanted).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("heads", "width", "queries", "keys"), [(3, 40, 70, 300), (2, 80, 33, 77), (1, 256, 9, 65), (3, 7, 6, 31)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1.0, 5.0])  # scores that are bounded by lengths, and ones that are not
@pytest.mark.usefixtures("emulated")
def test_attention(heads: int, width: int, queries: int, keys: int, masked: bool, size: float) -> None:
    query, key, value = (torch.randn(2, tokens, heads * width) for tokens in (queries, keys, keys))
    query, scale = size * query, width**-0.5
    mask = torch.randn(2 * heads, queries, keys) if masked else None
    if mask is not None:
        mask[:, :, 3:20] = -10000.0
    found = attention_kernel.attention(query, key, value, heads=heads, scale=scale, mask=mask)
    q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = scale * q @ k.mT + (0 if mask is None else mask.double().unflatten(0, (-1, heads)))
    wanted = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    bound = 1e-5 * wanted.abs().max()
    assert (found - wanted).abs().max() <= bound
    assert (wanted - wanted.roll(1, dims=1)).abs().max() > 10 * bound  # another query's would show
    codes = attention_kernel.attention(
        query, key, value, heads=heads, scale=scale, mask=mask, codes=(0.01, 90)
    )
    assert flips(codes, quantize_to_uint8(found, 0.01, 90)) <= 1e-3


@pytest.mark.parametrize(
    ("cpu", "target"),
    [
        ("", "armv8-a"),
        ("Features\t: fp asimd\nFeatures\t: fp asimd asimddp", "armv8-a"),  # a small core has none
        ("Features\t: fp asimd asimddp\nCPU part\t: 0xd0c", "armv8.2-a+dotprod"),
        ("Features\t: asimd asimddp i8mm bf16", "armv8.2-a+dotprod+i8mm"),
    ],
)
def test_options_follow_the_features_of_all_cores(cpu: str, target: str) -> None:
    options = library.compile_options("aarch64", library.common_features(cpu))
    assert f"-march={target}" in options
    assert "-march=native" not in options
    assert "-march=native" in library.compile_options("x86_64", set())


def quantized(y: Tensor, quantizer: tuple[float, int]) -> Tensor:
    scale, zero_point = quantizer
    return (y / scale + zero_point).round().clamp(0, 255)


def flips(found: Tensor, wanted: Tensor) -> float:
    """Share of codes that differ; none may by more than one."""
    difference = (found.double() - wanted.double()).abs()
    assert difference.max() <= 1
    return float((difference > 0).double().mean())
