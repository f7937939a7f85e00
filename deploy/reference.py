"""Reference backend: codes are dequantized at load, float kernels compute. Right everywhere, never faster."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from errata.deploy.packing import dequantize_weight
from errata.runtime.layers import Geometry
from errata.runtime.ranges import dequantize, quantize
from errata.runtime.scheme import LayerScheme
from errata.runtime.step_context import StepContext


class ReferenceQuantizer(nn.Module):
    """Quantizes and dequantizes an activation with the scale and zero point of the current step.

    The arithmetic is that of the simulation (`errata.compress.quantize.quantizers`), operation by
    operation. The step is read from the context's tensor, so that what is compiled or captured serves every
    step.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, *, bits: int, context: StepContext) -> None:
        super().__init__()
        self.scale: Tensor
        self.zero_point: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point.float())
        self.bits = bits
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid of the current step, same shape and dtype."""
        step = self.context.step_on(x.device)
        # Scalars without a dimension: with one they would turn half precision into float32.
        scale, zero_point = (
            table.index_select(0, step).squeeze(0) for table in (self.scale, self.zero_point)
        )
        return dequantize(quantize(x, scale, zero_point, bits=self.bits), scale, zero_point)


class ReferenceLayer(nn.Module):
    """Convolution or linear layer with a dequantized weight and quantized input."""

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        quantizers: Sequence[ReferenceQuantizer],
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", dequantize_weight(codes, weight_scale, scheme.input_widths))
        self.register_buffer("bias", bias)
        self.quantizers = nn.ModuleList(quantizers)

    def forward(self, x: Tensor) -> Tensor:
        """Same shapes as the float layer."""
        if self.quantizers:
            x = self.geometry.quantize_parts(x, self.scheme.input_widths, self.quantizers)
        return self.geometry.apply(x, self.weight, self.bias)
