"""Layers with random codes, and what they should give: float64 arithmetic on the codes themselves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from errata.deploy.cuda.layer import CudaLayer
from errata.deploy.cuda.selection import Selection
from errata.deploy.cuda.tables import DeviceStepTable
from errata.deploy.reference import dequantize_weight
from errata.runtime.layers import Geometry
from errata.runtime.ranges import quantize
from errata.runtime.scheme import LayerScheme
from errata.runtime.step_context import StepContext

SCALES = torch.tensor([0.004, 0.02, 0.1])  # differ 25-fold between steps
ZERO_POINTS = torch.tensor([0, 90, 255], dtype=torch.uint8)


@dataclass
class Case:
    """A layer and all that it was made of."""

    layer: CudaLayer
    context: StepContext
    weight: Tensor
    bias: Tensor | None

    def expected(self, x: Tensor, step: int, residual: Tensor | None = None) -> Tensor:
        """The layer in float64, on the codes that `x` has at a step."""
        geometry, widths = self.layer.geometry, self.layer.scheme.input_widths
        parts = geometry.split(x.float(), widths)
        grid = [self._on_grid(part, index, step) for index, part in enumerate(parts)]
        bias = None if self.bias is None else self.bias.double()
        output = geometry.apply(geometry.join(grid), self.weight.double(), bias)
        return output if residual is None else output + residual.double()

    def _on_grid(self, x: Tensor, part: int, step: int) -> Tensor:
        scale, zero_point = SCALES[step] * (part + 1), ZERO_POINTS[step].float()
        return (quantize(x, scale, zero_point, bits=8).double() - zero_point.double()) * scale.double()


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """`make_case(module, widths, selection, bits=8)`."""

    def make(
        module: nn.Conv2d | nn.Linear, widths: Sequence[int], selection: Selection, *, bits: int = 8
    ) -> Case:
        limit = 2 ** (bits - 1) - 1
        codes = torch.randint(-limit, limit + 1, module.weight.shape, dtype=torch.int8)
        scales = torch.rand(len(widths), codes.shape[0]) * 0.02 + 0.001
        scheme = LayerScheme(
            name="layer",
            kind="conv2d" if isinstance(module, nn.Conv2d) else "linear",
            weight_bits=bits,
            activation_bits=8,
            input_widths=tuple(widths),
        )
        context = StepContext()
        context.follow(torch.device("cpu"))
        tables = [DeviceStepTable(SCALES * (part + 1), ZERO_POINTS, context) for part in range(len(widths))]
        bias = None if module.bias is None else module.bias.detach()
        layer = CudaLayer(scheme, Geometry(module), codes, scales, bias, tables, selection)
        return Case(layer, context, dequantize_weight(codes, scales, tuple(widths)), bias)

    return make
