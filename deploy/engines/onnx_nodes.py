"""Quantized arithmetic as ONNX nodes that onnxruntime runs in int8, with scales chosen at run time.

Each function computes in torch what its nodes compute: torch's exporter calls `forward` when it traces a
network, and `symbolic` when it writes the graph. Scales and zero points are tables, one entry for each step,
and a `Gather` by the graph's step input takes the entry; so one graph serves every step.

A convolution is a product of matrices, whose rows are what each output pixel reads: `MatMulIntegerToFloat`
of onnxruntime gives the float output, exactly, where `QLinearConv` gives uint8 only and `ConvInteger` is
slower than float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.onnx.symbolic_opset9 import unused

from errata.runtime.ranges import dequantize, quantize

_PRODUCT = "com.microsoft::MatMulIntegerToFloat"
_UINT8_BITS = 8


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What each output pixel of a convolution reads; `kernel`, `stride`, `padding`, `dilation` are (y, x)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def are_pixels(self) -> bool:
        """Whether each output pixel reads the input pixel in its place, and no other."""
        return (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width of the output for those of the input."""
        height, width = (
            (size[axis] + 2 * self.padding[axis] - self.dilation[axis] * (self.kernel[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        return height, width

    def pixels(self, size: tuple[int, int]) -> Tensor:
        """Return the flat positions in the padded input that output pixels read; int32, `(H' W' kh kw,)`."""
        (height, width), padded_width = self.output_size(size), size[1] + 2 * self.padding[1]
        rows = _reads(height, self.kernel[0], self.stride[0], self.dilation[0])
        columns = _reads(width, self.kernel[1], self.stride[1], self.dilation[1])
        places = rows[:, None, :, None] * padded_width + columns[None, :, None, :]
        return places.flatten().to(torch.int32)


def _reads(outputs: int, kernel: int, stride: int, dilation: int) -> Tensor:
    return torch.arange(outputs)[:, None] * stride + torch.arange(kernel) * dilation


class QuantizedProduct(torch.autograd.Function):
    """A linear layer or convolution on uint8 codes of its input and int8 codes of its weight; float32 out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        windows: Windows | None,
        sizes: tuple[int, ...],
    ) -> Tensor:
        """Compute the layer.

        Args:
            ctx: unused, there is no backward.
            x: `(B, C, H, W)` for a convolution, else `(…, I)`; float32.
            step: int64, a scalar.
            scale: float32, `(T,)`.
            zero_point: uint8, `(T,)`.
            codes: int8, `(K, O)`; for a convolution K runs over kernel rows, kernel columns, channels.
            weight_scale: float32, `(O,)`.
            bias: float32, `(O,)`, or None.
            windows: of a convolution; None for a linear layer.
            sizes: of `x`, as plain numbers: the exporter does not tell them.
        """
        read = _on_grid(x, step, scale, zero_point)
        weight = codes.float() * weight_scale
        if windows is None:
            return functional.linear(read, weight.T, bias)
        shape = (*windows.kernel, x.shape[1], codes.shape[1])
        kernels = weight.reshape(shape).permute(3, 2, 0, 1)
        return functional.conv2d(read, kernels, bias, windows.stride, windows.padding, windows.dilation)

    @staticmethod
    def symbolic(
        g: Any,
        x: Any,
        step: Any,
        scale: Any,
        zero_point: Any,
        codes: Any,
        weight_scale: Any,
        bias: Any,
        windows: Windows | None,
        sizes: tuple[int, ...],
    ) -> Any:
        """Write the same as nodes."""
        at, zero, quantized = _quantized(g, x, step, scale, zero_point)
        outputs = weight_scale.type().sizes()[0]
        rows = quantized if windows is None else _rows(g, quantized, zero, windows, sizes)
        nothing = unused(g)
        product = g.op(
            _PRODUCT, rows, codes, at, weight_scale, zero, nothing, nothing if bias is None else bias
        )
        if windows is None:
            return _typed(product, weight_scale, [None, *sizes[1:-1], outputs])
        height, width = windows.output_size((sizes[2], sizes[3]))
        product = _typed(product, weight_scale, [None, height, width, outputs])
        output = g.op("Transpose", product, perm_i=[0, 3, 1, 2])
        return _typed(output, weight_scale, [None, outputs, height, width])


class QuantizedMatMul(torch.autograd.Function):
    """The product of two activations, each on its uint8 codes of the step; float32 out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        step: Tensor,
        x_scale: Tensor,
        x_zero_point: Tensor,
        y_scale: Tensor,
        y_zero_point: Tensor,
        is_transposed: bool,
        sizes: tuple[int, int],
    ) -> Tensor:
        """Return `x y`, or `x yᵀ`.

        Args:
            ctx: unused, there is no backward.
            x: `(B, L, I)`, float32.
            y: `(B, I, K)`, or `(B, K, I)` if it is transposed; float32.
            step: int64, a scalar.
            x_scale: float32, `(T,)`.
            x_zero_point: uint8, `(T,)`.
            y_scale: float32, `(T,)`.
            y_zero_point: uint8, `(T,)`.
            is_transposed: whether `y` is.
            sizes: L and K.
        """
        left, right = _on_grid(x, step, x_scale, x_zero_point), _on_grid(y, step, y_scale, y_zero_point)
        return torch.bmm(left, right.transpose(1, 2) if is_transposed else right)

    @staticmethod
    def symbolic(
        g: Any,
        x: Any,
        y: Any,
        step: Any,
        x_scale: Any,
        x_zero_point: Any,
        y_scale: Any,
        y_zero_point: Any,
        is_transposed: bool,
        sizes: tuple[int, int],
    ) -> Any:
        """Write the same as nodes."""
        at, zero, left = _quantized(g, x, step, x_scale, x_zero_point)
        other_at, other_zero, right = _quantized(g, y, step, y_scale, y_zero_point)
        if is_transposed:
            right = g.op("Transpose", right, perm_i=[0, 2, 1])
        product = g.op(_PRODUCT, left, right, at, other_at, zero, other_zero)
        return _typed(product, x_scale, [None, *sizes])


class Int8Grid(torch.autograd.Function):
    """Whole numbers from -128 to 127: `QuantizeLinear` and `DequantizeLinear` of constant scale 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """Return `x` rounded to nearest even and clamped; float32, same shape."""
        return x.round().clamp(-128, 127)

    @staticmethod
    def symbolic(g: Any, x: Any, sizes: tuple[int, ...]) -> Any:
        """Write the same as nodes."""
        one = g.op("Constant", value_t=torch.tensor(1.0))
        zero = g.op("Constant", value_t=torch.tensor(0, dtype=torch.int8))
        codes = g.op("QuantizeLinear", x, one, zero)
        return _typed(g.op("DequantizeLinear", codes, one, zero), one, [None, *sizes[1:]])


class Dequantized(torch.autograd.Function):
    """A weight from its int8 codes `(O, …)` and scales `(O,)`; float32."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, scale: Tensor) -> Tensor:
        """Return `scale · codes`, output channel by output channel."""
        return codes.float() * scale.reshape(-1, *([1] * (codes.ndim - 1)))

    @staticmethod
    def symbolic(g: Any, codes: Any, scale: Any) -> Any:
        """Write the same as one node."""
        return _typed(g.op("DequantizeLinear", codes, scale, axis_i=0), scale, codes.type().sizes())


def _on_grid(x: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return an activation quantized and dequantized with the scale of a step."""
    at, zero = scale[step], zero_point[step].float()
    return dequantize(quantize(x, at, zero, bits=_UINT8_BITS), at, zero)


def _quantized(g: Any, x: Any, step: Any, scale: Any, zero_point: Any) -> tuple[Any, Any, Any]:
    """Return scale, zero point and codes of `x`, of the step."""
    at, zero = g.op("Gather", scale, step, axis_i=0), g.op("Gather", zero_point, step, axis_i=0)
    return at, zero, g.op("QuantizeLinear", x, at, zero)


def _rows(g: Any, codes: Any, zero: Any, windows: Windows, sizes: tuple[int, ...]) -> Any:
    """Return what each output pixel reads, `(B, H', W', kh kw C)`, from codes `(B, C, H, W)`.

    Padding is real zero, the zero point. One `Gather` copies what slices, concatenated, would copy twice.
    """
    pixels = g.op("Transpose", codes, perm_i=[0, 2, 3, 1])
    if windows.are_pixels:
        return pixels
    channels, height, width = sizes[1:]
    top, left = windows.padding
    if (top, left) != (0, 0):
        pixels = g.op("Pad", pixels, _constant(g, [0, top, left, 0, 0, top, left, 0]), zero)
    count = (height + 2 * top) * (width + 2 * left)
    listed = g.op("Reshape", pixels, _constant(g, [-1, count, channels]))
    places = g.op("Constant", value_t=windows.pixels((height, width)))
    read = g.op("Gather", listed, places, axis_i=1)
    each = windows.kernel[0] * windows.kernel[1] * channels
    return g.op("Reshape", read, _constant(g, [-1, *windows.output_size((height, width)), each]))


def _constant(g: Any, values: list[int]) -> Any:
    return g.op("Constant", value_t=torch.tensor(values, dtype=torch.int64))


def _typed(value: Any, like: Any, sizes: list[int | None]) -> Any:
    """Give a value its type, which the exporter cannot infer for a node of another domain."""
    value.setType(like.type().with_sizes(sizes))
    return value
