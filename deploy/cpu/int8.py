"""Convolutions and linear layers on uint8 activations by int8 symmetric weights, with int32 sums.

The products are oneDNN's, or those of the project's own kernel (`vnni`).

One packed weight serves every sampling step: scale and zero point of the activation are given at run time.
Packed layouts are made at load and never stored.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.deploy.cpu import native
from errata.deploy.cpu.vnni import VNNIProduct
from errata.runtime.layers import Geometry
from errata.runtime.scheme import LayerScheme
from errata.runtime.step_context import StepContext

_NO_POST_OP: tuple[str, list[Any], str] = ("none", [], "")
# Output pixels of a batch up to which a convolution is done as a product of matrices.
_FEW_PIXELS = 512


def is_available() -> bool:
    """Return whether products of uint8 by int8 are exact on this CPU, by oneDNN or errata's own kernel."""
    return has_onednn() or not native.product_obstacle()


def has_onednn() -> bool:
    """Return whether those of oneDNN are: without AVX512-VNNI, as torch 2.13 tells it, they may saturate."""
    return bool(torch.cpu._is_vnni_supported()) and hasattr(torch.ops.onednn, "qconv_pointwise")


def codes_of(x: Tensor, quantizer: tuple[float, int]) -> Tensor:
    """Return the codes of `x`, uint8, same shape, natively where that can be; see `quantize_to_uint8`."""
    if x.dtype is not torch.float32 or native.obstacle():
        return quantize_to_uint8(x, *quantizer)
    return native.quantize(x, quantizer)


def quantize_to_uint8(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """Return the codes of `x`, uint8, same shape and memory format: one fused pass.

    `torch.quantize_per_tensor` is deprecated (torch 2.13 still has it) but faster than tensor operations,
    which take its place where it is gone. NaN has no code: unlike the reference, int8 does not pass it on.
    """
    if not _has_fused_quantizer():
        return x.div(scale).add_(zero_point).round_().clamp_(0, 255).to(torch.uint8)
    codes = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8)
    # The bytes of the quantized tensor, seen as uint8: `int_repr` would copy them.
    return torch.empty(0, dtype=torch.uint8).set_(codes.untyped_storage(), 0, codes.size(), codes.stride())


@functools.cache
def _has_fused_quantizer() -> bool:
    """Return whether torch has it; asked once, because torch warns of the deprecation once."""
    if not hasattr(torch, "quantize_per_tensor"):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
    return True


class StepQuantizer(tuple[float, int]):
    """Scale and zero point of one step, which know their table.

    Attributes:
        table: where they come from.
    """

    table: StepTable

    @classmethod
    def of(cls, table: StepTable, scale: float, zero_point: int) -> StepQuantizer:
        """Return the pair of a table."""
        pair = cls((scale, zero_point))
        pair.table = table
        return pair


class StepTable:
    """Scale and zero point of one activation quantizer by step, as Python numbers."""

    def __init__(self, scale: Tensor, zero_point: Tensor, context: StepContext) -> None:
        self._scale_bits: list[int] = scale.float().view(torch.int32).tolist()
        pairs = zip(scale.tolist(), zero_point.tolist(), strict=True)
        self._pairs = [StepQuantizer.of(self, *pair) for pair in pairs]
        self._context = context

    def now(self) -> StepQuantizer:
        """Return the pair of the current step."""
        return self._pairs[self._context.declared_step]

    def equals(self, other: StepTable) -> bool:
        """Return whether both quantize alike at every step."""
        return self._pairs == other._pairs

    def scale_bits(self, step: int, time: float) -> int:
        """Return the scale of a step as C stores it; `time` has no part in it."""
        return self._scale_bits[step] & 0xFFFFFFFF

    def zero_point_bits(self, step: int, time: float) -> int:
        """Return the zero point of a step, likewise."""
        return self._pairs[step][1] & 0xFFFFFFFF


def distinct(quantizers: Sequence[tuple[float, int]]) -> tuple[list[tuple[float, int]], list[int]]:
    """Return the quantizers that differ at any step, and for each that is given its place among them."""
    found: list[tuple[float, int]] = []
    places = []
    for quantizer in quantizers:
        place = next((place for place, other in enumerate(found) if _are_alike(quantizer, other)), len(found))
        places.append(place)
        if place == len(found):
            found.append(quantizer)
    return found, places


def _are_alike(first: tuple[float, int], second: tuple[float, int]) -> bool:
    if isinstance(first, StepQuantizer) and isinstance(second, StepQuantizer):
        return first == second and first.table.equals(second.table)
    return first == second


class OneDNNQuantizer(nn.Module):
    """Quantizer and dequantizer of an activation (query, key and value of an attention)."""

    def __init__(self, table: StepTable) -> None:
        super().__init__()
        self.table = table

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid of the current step."""
        scale, zero_point = self.table.now()
        codes = quantize_to_uint8(x, scale, zero_point)
        return (codes.to(x.dtype) - zero_point) * scale


class Int8Layer(nn.Module):
    """Convolution or linear layer on int8 kernels.

    Attributes:
        bias: float32 `(O,)`, or None.
        tables: scale and zero point by step, of each part of the input.
        products: what multiplies each part.

    Args:
        product: what multiplies each part, `VNNIProduct` or `OneDNNProduct`.
    """

    def __init__(
        self,
        scheme: LayerScheme,
        geometry: Geometry,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        tables: list[StepTable],
        *,
        product: type[VNNIProduct | OneDNNProduct],
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.geometry = geometry
        self.tables = tables
        self.bias = bias if bias is None else bias.contiguous()
        parts = codes.split(list(scheme.input_widths), dim=1)
        self.products = [
            product(geometry, part, scale.contiguous())
            for part, scale in zip(parts, weight_scale, strict=True)
        ]

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """Return the output, shaped as the float layer's; float32, channels_last from a convolution."""
        return self.product(self.quantized(self.split(x)), self.bias)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of an input."""
        if len(self.tables) == 1:
            return (x,)
        return self.geometry.split(x, self.scheme.input_widths)

    def quantizers(self) -> list[StepQuantizer]:
        """Return scale and zero point of each part, of the current step."""
        return [table.now() for table in self.tables]

    def quantized(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the codes of the parts of an input, with the scales of the current step."""
        return [
            product.codes_of(part, quantizer)
            for product, part, quantizer in zip(self.products, parts, self.quantizers(), strict=True)
        ]

    def product(
        self,
        codes: Sequence[Tensor],
        bias: Tensor | None,
        added: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        below: int = 0,
    ) -> Tensor:
        """Return the layer on the codes of its parts, with a bias, plus `added`, float32; free to be changed.

        Args:
            codes: of each part.
            bias: `(O,)`, or None.
            added: float32, of the shape of the result, or None.
            dtype: that of the result, float32 or bfloat16.
            below: lines and columns of padding that a convolution reads below and on the right, besides its
                own padding.
        """
        *firsts, last = zip(self.products, codes, self.quantizers(), strict=True)
        for product, part, quantizer in firsts:
            added, bias = product(part, quantizer, bias, added, torch.float32, below=below), None
        product, part, quantizer = last
        return product(part, quantizer, bias, added, dtype, below=below)


def is_of_one_part(layer: nn.Module) -> TypeGuard[Int8Layer]:
    """Return whether a layer is an int8 layer whose input has one part, with one scale."""
    return isinstance(layer, Int8Layer) and len(layer.tables) == 1


class OneDNNProduct:
    """Product with the weight of one part, int8 `(O, I)` or `(O, I, kh, kw)`, a scale for each output.

    A convolution of few pixels, or of kernel 1, is done as a product of matrices, with the same result to
    the last bit: oneDNN's convolutions take up to four times as long there. The weight is packed at the first
    call, when its pixels are known, and once: where a later call has more or fewer, the same kernel serves.
    """

    def __init__(self, geometry: Geometry, weight: Tensor, scale: Tensor) -> None:
        self._geometry = geometry
        self._weight: Tensor | None = weight
        self._kernel = tuple(weight.shape[2:])
        self._scale = scale
        self._zero_point = torch.zeros(weight.shape[0], dtype=torch.int64)
        self._packed: Tensor | None = None
        self._is_matrix = not geometry.is_conv
        self._packing = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> OneDNNProduct:
        """Return itself: only its weight's layout ever changes, and clones of an artifact share weights."""
        return self

    def __call__(
        self,
        codes: Tensor,
        quantizer: tuple[float, int],
        bias: Tensor | None,
        added: Tensor | None,
        dtype: torch.dtype,
        *,
        below: int = 0,
    ) -> Tensor:
        """Return the product with codes, `(B, I, H, W)` or `(…, I)`, plus `added`, float32 of its shape.

        `dtype` is that of the result, float32 or bfloat16; `below` is told in `Int8Layer.product`.
        """
        if below:
            codes = functional.pad(codes, (0, below, 0, below), value=quantizer[1])
        output = self._multiplied(codes, *quantizer, bias)
        # oneDNN would add in its epilogue (post-op "sum"), but torch 2.13 then copies the whole result.
        output = output if added is None else output.add_(added)
        return output.to(dtype)

    def codes_of(self, x: Tensor, quantizer: tuple[float, int]) -> Tensor:
        """Return the codes of `x`, same shape."""
        return codes_of(x, quantizer)

    def _multiplied(self, codes: Tensor, scale: float, zero_point: int, bias: Tensor | None) -> Tensor:
        if self._packed is None:
            with self._packing:
                self._pack(codes)
        inputs = (scale, zero_point, self._packed, self._scale, self._zero_point, bias)
        if not self._is_matrix:
            return self._convolved(codes, inputs)
        if not self._geometry.is_conv:
            return _matrix_product(codes, inputs)
        rows = codes.permute(0, 2, 3, 1)
        if self._kernel != (1, 1):
            rows = self._windows(codes, zero_point)
        return _matrix_product(rows, inputs).permute(0, 3, 1, 2)

    def _pack(self, codes: Tensor) -> None:
        if self._weight is None:  # another thread was faster
            return
        weight = self._weight
        if self._geometry.is_conv:
            self._is_matrix = self._is_better_as_matrix(codes)
        if not self._is_matrix:
            self._packed = torch.ops.onednn.qconv_prepack(
                weight.contiguous(), self._scale, 1.0, 0, *self._shape(), None
            )
        else:
            rows = weight.permute(0, 2, 3, 1).flatten(1) if self._geometry.is_conv else weight
            self._packed = torch.ops.onednn.qlinear_prepack(rows.contiguous(), None)
        self._weight = None

    def _is_better_as_matrix(self, codes: Tensor) -> bool:
        geometry = self._geometry
        if self._kernel == (1, 1):
            return tuple(geometry.stride) == (1, 1) and tuple(geometry.padding) == (0, 0)
        height, width = self._output_size(codes)
        return tuple(geometry.dilation) == (1, 1) and len(codes) * height * width <= _FEW_PIXELS

    def _convolved(self, codes: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        output: Tensor = torch.ops.onednn.qconv_pointwise(
            codes, *inputs, *self._shape(), 1.0, 0, torch.float32, *_NO_POST_OP
        )
        return output

    def _windows(self, codes: Tensor, zero_point: int) -> Tensor:
        """Return what output pixels read, `(B, H', W', kh kw I)`; padding is real zero, the zero point."""
        (top, left), (down, right) = self._geometry.padding, self._geometry.stride
        height, width = self._output_size(codes)
        padded = functional.pad(codes, (left, left, top, top), value=zero_point)
        padded = padded.contiguous(memory_format=torch.channels_last)
        batch, channels, _, row = padded.shape
        image, line = padded.shape[2] * row * channels, row * channels
        windows = padded.as_strided(
            (batch, height, width, *self._kernel, channels),
            (image, down * line, right * channels, line, channels, 1),
        )
        return windows.reshape(batch, height, width, -1)

    def _output_size(self, codes: Tensor) -> tuple[int, int]:
        sizes = zip(codes.shape[2:], self._kernel, self._geometry.padding, self._geometry.stride, strict=True)
        height, width = ((size + 2 * pad - kernel) // stride + 1 for size, kernel, pad, stride in sizes)
        return height, width

    def _shape(self) -> tuple[list[int], list[int], list[int], int]:
        geometry = self._geometry
        return list(geometry.stride), list(geometry.padding), list(geometry.dilation), 1


def _matrix_product(codes: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    output: Tensor = torch.ops.onednn.qlinear_pointwise(codes, *inputs, 1.0, 0, torch.float32, *_NO_POST_OP)
    return output
