"""The C code for 64-bit ARM, on CPUs that qemu emulates: with and without dot products and bfloat16."""

from collections.abc import Iterator

import arm
import pytest
import torch
from torch import Tensor, nn

from errata.deploy.cpu import native
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
    assert cpu.product_name() == PRODUCT_NAMES[request.param]
    with arm.instead(cpu):
        yield cpu
    cpu.close()


CASES = [
    # Channels in sixteens, and not; outputs in vectors of sixteen, and not; pixels that do not fill the last tile.
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
