"""int8 layers, of both kernels, against a slow reference: float64 arithmetic on the codes themselves."""

from collections.abc import Iterator

import pytest
import torch
from cpu_builds import BUILDS, NATIVE, running
from torch import Tensor, nn

from errata.deploy.cpu import int8, native
from errata.deploy.cpu.int8 import Int8Layer, OneDNNProduct, OneDNNQuantizer, StepTable, quantize_to_uint8
from errata.deploy.cpu.vnni import VNNIProduct
from errata.deploy.reference import dequantize_weight
from errata.runtime.layers import Geometry
from errata.runtime.scheme import LayerScheme
from errata.runtime.step_context import StepContext

pytestmark = pytest.mark.skipif(not int8.is_available(), reason="this CPU has no VNNI instructions")

SCALES = torch.tensor([0.004, 0.02, 0.1])  # differ 25-fold between steps
ZERO_POINTS = torch.tensor([0, 90, 255], dtype=torch.uint8)
PRODUCTS: dict[str, type[VNNIProduct | OneDNNProduct]] = {
    "vnni": VNNIProduct,
    "tiles": VNNIProduct,
    "onednn": OneDNNProduct,
    **dict.fromkeys(BUILDS, VNNIProduct),
}


@pytest.fixture(params=list(PRODUCTS))
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Names a product; of errata's own, each way that this CPU has, the slower ones as well."""
    with running(request.param if request.param in BUILDS else NATIVE):
        yield _checked(request, monkeypatch)


def _checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "onednn" and not int8.has_onednn():
        pytest.skip("oneDNN's products would saturate on this CPU")
    if request.param != "onednn" and native.product_obstacle():
        pytest.skip(native.product_obstacle())
    if request.param == "tiles" and not native.has_tiles():
        pytest.skip("this CPU has no AMX")
    if request.param == "vnni":
        monkeypatch.setattr(native, "has_tiles", lambda: False)
    return str(request.param)


def make(
    module: nn.Conv2d | nn.Linear, widths: tuple[int, ...], context: StepContext, kernel: str
) -> tuple[Int8Layer, Tensor]:
    codes = torch.randint(-127, 128, module.weight.shape, dtype=torch.int8)
    scales = torch.rand(len(widths), codes.shape[0]) * 0.02 + 0.001
    scheme = LayerScheme(
        name="layer",
        kind="conv2d" if isinstance(module, nn.Conv2d) else "linear",
        weight_bits=8,
        activation_bits=8,
        input_widths=widths,
    )
    tables = [StepTable(SCALES * (part + 1), ZERO_POINTS, context) for part in range(len(widths))]
    bias = None if module.bias is None else module.bias.detach()
    layer = Int8Layer(scheme, Geometry(module), codes, scales, bias, tables, product=PRODUCTS[kernel])
    return layer, dequantize_weight(codes, scales, widths)


CASES = [
    (nn.Conv2d(16, 24, 3, padding=1), (16,), (2, 16, 9, 9)),
    (nn.Conv2d(16, 24, 3, padding=1, stride=2), (16,), (2, 16, 8, 8)),
    (nn.Conv2d(40, 24, 1, bias=False), (16, 24), (2, 40, 7, 7)),
    (nn.Conv2d(40, 24, 3, padding=1), (16, 24), (2, 40, 7, 7)),
    (nn.Linear(16, 32), (16,), (2, 10, 16)),
    (nn.Linear(16, 32, bias=False), (16,), (5, 16)),
    (nn.Linear(40, 32), (16, 24), (2, 10, 40)),
    # Outputs that fill one to four vectors, and not the last; pixels that do not fill the last tile.
    (nn.Conv2d(4, 13, 3, padding=1), (4,), (1, 4, 5, 3)),
    (nn.Conv2d(8, 100, (3, 1), padding=(1, 0)), (8,), (3, 8, 5, 7)),
    (nn.Conv2d(12, 39, 5, padding=4, dilation=2, stride=(1, 2)), (12,), (2, 12, 11, 9)),
    (nn.Conv2d(8, 130, 3), (8,), (2, 8, 6, 5)),
    (nn.Linear(64, 64), (64,), (1, 64)),
    # Rows of 64, 48 and 32 bytes for a CPU with tiles; tiles that are whole or not, on lines or across them.
    (nn.Conv2d(64, 80, 3, padding=1), (64,), (2, 64, 5, 16)),
    (nn.Conv2d(128, 33, 3, padding=1), (64, 64), (2, 128, 9, 9)),
    (nn.Conv2d(64, 16, 3, padding=1), (64,), (3, 64, 4, 35)),
    (nn.Conv2d(96, 48, 3, stride=2, padding=1), (96,), (2, 96, 9, 34)),
    (nn.Conv2d(32, 20, (2, 3), padding=(2, 1), dilation=(1, 3)), (32,), (2, 32, 7, 12)),
    (nn.Conv2d(64, 24, 3, padding=1, stride=(1, 2)), (64,), (1, 64, 3, 3)),
    (nn.Conv2d(32, 24, 1, padding=1), (32,), (2, 32, 5, 6)),
    (nn.Conv2d(32, 24, 1, stride=2), (32,), (2, 32, 5, 6)),
    (nn.Conv2d(192, 70, 1), (64, 128), (2, 192, 6, 7)),
    (nn.Linear(320, 100), (320,), (2, 37, 320)),
    (nn.Linear(224, 64), (224,), (16, 224)),
]


@pytest.mark.parametrize(("module", "widths", "shape"), CASES)
def test_a_layer_equals_float64_arithmetic_on_its_codes(
    module: nn.Conv2d | nn.Linear, widths: tuple[int, ...], shape: tuple[int, ...], kernel: str
) -> None:
    context = StepContext()
    layer, weight = make(module, widths, context, kernel)
    x = torch.randn(shape) * 2
    outputs = []
    for step in range(3):
        with context.at(step):
            outputs.append(layer(x))
        parts = Geometry(module).split(x, widths)
        rounded = [
            dequantized(part, SCALES[step].item() * (index + 1), int(ZERO_POINTS[step]))
            for index, part in enumerate(parts)
        ]
        bias = None if module.bias is None else module.bias.double()
        expected = Geometry(module).apply(Geometry(module).join(rounded), weight.double(), bias)
        bound = 2e-6 * expected.abs().max()
        assert (outputs[-1] - expected).abs().max() <= bound
        others = [(output - expected).abs().max() for output in outputs[:-1]]
        assert all(other > 10 * bound for other in others)  # another step's scale would show


@pytest.mark.parametrize(("module", "widths", "shape"), CASES)
def test_what_is_added_is_added(
    module: nn.Conv2d | nn.Linear, widths: tuple[int, ...], shape: tuple[int, ...], kernel: str
) -> None:
    context = StepContext()
    layer, _ = make(module, widths, context, kernel)
    x = torch.randn(shape)
    with context.at(1):
        plain = layer(x)
        added = torch.randn(plain.shape)  # of another memory format than a convolution's output
        given = added.clone()
        output = layer.product(layer.quantized(layer.split(x)), layer.bias, added)
        half = layer.product(layer.quantized(layer.split(x)), layer.bias, added, dtype=torch.bfloat16)
    assert torch.equal(half, output.bfloat16())
    assert torch.equal(added, given)
    assert (output - plain - added).abs().max() <= 1e-5 * (1 + plain.abs().max())


def test_neither_threads_nor_neighbours_change_a_result(kernel: str) -> None:
    context = StepContext()
    layer, _ = make(nn.Conv2d(32, 48, 3, padding=1), (32,), context, kernel)
    x = torch.randn(3, 32, 9, 9)
    with context.at(1):
        together, alone = layer(x), layer(x[1:2])
        torch.set_num_threads(3)
        try:
            threaded = layer(x)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(together[1:2], alone)
    assert torch.equal(together, threaded)


@pytest.mark.parametrize("channels", [32, 128])
def test_an_input_of_other_channels_is_refused(channels: int, kernel: str) -> None:
    context = StepContext()
    layer, _ = make(nn.Linear(64, 32), (64,), context, kernel)
    with context.at(1), pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(2, 5, channels))


@pytest.mark.parametrize("values", [255, 0])
def test_the_largest_sums_are_exact(values: int, kernel: str) -> None:
    """Where a product of pairs were summed in int16, these would saturate."""
    context = StepContext()
    layer, weight = make(nn.Linear(2304, 16, bias=False), (2304,), context, kernel)
    codes = torch.full((7, 2304), values, dtype=torch.uint8)
    with context.at(1):
        output = layer.product([codes], None)
    expected = ((codes.double() - int(ZERO_POINTS[1])) * SCALES[1].double()) @ weight.double().T
    assert (output - expected).abs().max() <= 2e-6 * expected.abs().max()


def dequantized(x: Tensor, scale: float, zero_point: int) -> Tensor:
    codes = quantize_to_uint8(x, scale, zero_point)
    return (codes.double() - zero_point) * torch.tensor(scale, dtype=torch.float32).double()


def test_the_fused_quantizer_agrees_with_tensor_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 8, 9, 9).to(memory_format=torch.channels_last) * 3
    fused = quantize_to_uint8(x, 0.03, 100)
    monkeypatch.setattr(int8, "_has_fused_quantizer", lambda: False)
    plain = quantize_to_uint8(x, 0.03, 100)
    assert fused.dtype is plain.dtype is torch.uint8
    difference = (fused.int() - plain.int()).abs()
    assert difference.max() <= 1  # ties may round either way
    assert difference.float().mean() < 1e-3


def test_attention_quantizer_rounds_to_the_grid_of_the_step() -> None:
    context = StepContext()
    quantizer = OneDNNQuantizer(StepTable(SCALES, ZERO_POINTS, context))
    x = torch.randn(1000)
    with context.at(1):
        output = quantizer(x)
    codes = output / 0.02
    assert (codes - codes.round()).abs().max() < 1e-3
    assert (output - x).abs()[(output > -1.7) & (output < 3.2)].max() <= 0.0101
