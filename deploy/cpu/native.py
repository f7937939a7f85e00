"""The native operations of the CPU, called from Python.

Between two int8 products lie group normalization, SiLU and quantization. As tensor operations each is a pass
over memory; `norm_quantize.c` does them in two. `int8_product.c` has the products themselves, for CPUs with
AVX512-VNNI, AVX-VNNI, AVX2 or NEON, `int8_tiles.c` those for AMX.

A quantizer is a scale and a zero point. One that belongs to a step comes from a table (`int8.StepTable`), and
knows it: a recording needs the table.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from errata.deploy.cpu import library as compiled
from errata.deploy.cpu import recording
from errata.deploy.cpu.arguments import (
    Adjust,
    LayerNormQuantize,
    NormQuantize,
    Quantize,
    Quantizers,
    Upsample,
)
from errata.deploy.cpu.instructions import Operation, Varying

Quantizer = tuple[float, int]


def obstacle() -> str:
    """Return why there is no native code; empty where there is."""
    return compiled.obstacle()


def product_obstacle() -> str:
    """Return why `int8_product` cannot be called; empty where it can."""
    if reason := obstacle():
        return reason
    return "" if compiled.library().errata_has_int8_product() else "this CPU has no AVX2"


def product_name() -> str:
    """Return what instructions multiply; empty where `int8_product` cannot be called."""
    return "" if obstacle() else compiled.library().errata_int8_product_name().decode()


def has_tiles() -> bool:
    """Return whether this CPU has AMX, and the system lets this process use it."""
    return not obstacle() and bool(compiled.library().errata_has_tiles())


def tiles_serve(channels: int) -> bool:
    """Return whether tiles multiply so many channels faster than vectors."""
    return bool(compiled.library().errata_tiles_serve(channels))


def call(
    operation: Operation,
    arguments: ctypes.Structure,
    reads: Sequence[Tensor],
    writes: Sequence[Tensor],
    *,
    varying: Sequence[Varying] = (),
    kept: Sequence[Any] = (),
) -> None:
    """Carry out an operation; let a recorder know of it.

    Args:
        operation: which one.
        arguments: as C reads them.
        reads: all tensors that it reads, constants too.
        writes: all tensors that it writes.
        varying: what of the arguments depends on the sampling step.
        kept: what else the arguments point to.

    Raises:
        MemoryError: there is too little.
    """
    with told_to_profiler(f"errata::{operation.name.lower()}"):
        failed = compiled.library().errata_call(operation, ctypes.byref(arguments))
    if failed:
        raise MemoryError(f"no memory for {operation.name.lower()} of {tuple(reads[0].shape)}")
    if (recorder := recording.active()) is not None:
        recorder.add(operation, arguments, reads, writes, varying=varying, kept=kept)


def norm_quantize(
    x: Tensor,
    norm: nn.GroupNorm,
    quantizers: Sequence[tuple[float, int]],
    widths: Sequence[int],
    *,
    silu: bool,
    raw: Sequence[tuple[float, int]] = (),
    starts: Sequence[int] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the codes of the normalized (and activated) parts of `x`, and of its raw parts if asked for.

    Args:
        x: `(B, C, H, W)`, float32, channels_last.
        norm: over its channels, with weight and bias.
        quantizers: scale and zero point of each part.
        widths: channels of each part.
        silu: whether the normalized values pass through SiLU.
        raw: scale and zero point of each part of `x` itself.
        starts: first channel of each part; None where each begins where the one before ends.

    Returns:
        uint8, channels_last, `(B, width, H, W)` each.

    Raises:
        ValueError: the norm, or a part, has other channels; the C code would read beyond them.
    """
    assert x.dtype is torch.float32
    x = x.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = x.shape
    starts = (0, *itertools.accumulate(widths[:-1])) if starts is None else tuple(starts)
    ends = [start + part for start, part in zip(starts, widths, strict=True)]
    if norm.num_channels != channels or max(ends) > channels:
        raise ValueError(f"{channels} channels, a norm of {norm.num_channels}, parts that end at {max(ends)}")
    shapes = [(batch, width_of_part, height, width) for width_of_part in widths]
    normed_codes, raw_codes = (
        _Codes(shapes if given else [], given, torch.channels_last) for given in (quantizers, raw)
    )
    first_channels, channels_of_parts = _integers(starts), _integers(tuple(widths))
    arguments = NormQuantize(
        (ctypes.c_void_p * 2)(x.data_ptr(), None), (ctypes.c_int64 * 2)(channels, 0),
        batch, height * width, norm.num_groups, norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps, silu,
        len(widths), ctypes.addressof(first_channels), ctypes.addressof(channels_of_parts),
        normed_codes.address, raw_codes.address if raw else None,
    )  # fmt: skip
    call(
        Operation.NORM_QUANTIZE,
        arguments,
        [x, norm.weight, norm.bias],
        [*normed_codes.tensors, *raw_codes.tensors],
        varying=[*normed_codes.varying(), *raw_codes.varying()],
        kept=[first_channels, channels_of_parts, normed_codes, raw_codes],
    )
    return normed_codes.tensors, raw_codes.tensors


def layer_norm_quantize(
    x: Tensor, norm: nn.LayerNorm, quantizers: Sequence[tuple[float, int]]
) -> list[Tensor]:
    """Return the codes of layer-normalized rows of `x`, for each quantizer.

    Args:
        x: `(…, C)`, float32.
        norm: over C, with weight and bias.
        quantizers: a scale and a zero point each.

    Returns:
        uint8, of the shape of `x`, each.

    Raises:
        ValueError: the norm has other channels; the C code would read beyond them.
    """
    assert x.dtype is torch.float32
    if tuple(norm.normalized_shape) != tuple(x.shape[-1:]):
        raise ValueError(f"rows of {x.shape[-1]} channels, a norm of {tuple(norm.normalized_shape)}")
    x = x.contiguous()
    codes = _Codes([x.shape] * len(quantizers), quantizers)
    arguments = LayerNormQuantize(
        x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], norm.weight.data_ptr(), norm.bias.data_ptr(),
        norm.eps, len(quantizers), codes.address,
    )  # fmt: skip
    reads = [x, norm.weight, norm.bias]
    call(
        Operation.LAYER_NORM_QUANTIZE, arguments, reads, codes.tensors, varying=codes.varying(), kept=[codes]
    )
    return codes.tensors


def quantize(x: Tensor, quantizer: Quantizer, *, padded: int | None = None) -> Tensor:
    """Return the codes of `x`, uint8, dense, channels_last of an image and else contiguous.

    Args:
        x: float32, an image `(B, C, H, W)` or of any other shape.
        quantizer: of the codes.
        padded: channels of the result, if more; they are real zeros. Images only.
    """
    assert x.dtype is torch.float32
    if x.ndim == 4:
        batch, channels, height, width = x.shape
        if x.stride(2) != width * x.stride(3):
            x = x.contiguous(memory_format=torch.channels_last)
        shape = (batch, channels if padded is None else padded, height, width)
        codes = recording.empty(shape, torch.uint8, torch.channels_last)
        steps = (x.stride(0), x.stride(3), x.stride(1))
        sizes = (batch, height * width, channels, shape[1])
    else:
        x = x.contiguous()
        codes = recording.empty(x.shape, torch.uint8)
        sizes, steps = (1, 1, x.numel(), x.numel()), (x.numel(), x.numel(), 1)
    arguments = Quantize(x.data_ptr(), codes.data_ptr(), *sizes, *steps, *quantizer)
    call(Operation.QUANTIZE, arguments, [x], [codes], varying=varying_fields(arguments, quantizer))
    return codes


def upsample(codes: Tensor) -> Tensor:
    """Return codes `(B, C, H, W)` repeated to `(B, C, 2H, 2W)`, channels_last."""
    codes = codes.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = codes.shape
    out = recording.empty((batch, channels, 2 * height, 2 * width), torch.uint8, torch.channels_last)
    arguments = Upsample(codes.data_ptr(), out.data_ptr(), batch, height, width, channels)
    call(Operation.UPSAMPLE, arguments, [codes], [out])
    return out


def adjust(
    y: Tensor,
    shift: Tensor,
    *,
    gain: Tensor | None = None,
    added: Tensor | None = None,
    step: int = 0,
    by_sample: bool = False,
) -> Tensor:
    """Return `gain y + shift + added` in the memory of `y`.

    Args:
        y: float32, an image `(B, C, H, W)`, channels_last, or `(…, C)`, contiguous.
        shift: float32, `(T, C)`, contiguous, with dimensions of one more or less: a row for each step.
        gain: likewise; None is one.
        added: of the shape of `y`.
        step: which of the rows; a recording takes that of the step it is run for, if there are several.
        by_sample: `shift` has a row for each sample instead, `(B, C)`.
    """
    is_image = y.ndim == 4
    channels = y.shape[1] if is_image else y.shape[-1]
    tables = [table for table in (gain, shift) if table is not None]
    if any(table.dtype is not torch.float32 or table.numel() % channels for table in (y, *tables)):
        raise ValueError(f"tables {[tuple(table.shape) for table in tables]} for {channels} channels")
    memory_format = torch.channels_last if is_image else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format)
    added = None if added is None else added.contiguous(memory_format=memory_format)
    row = 4 * channels
    arguments = Adjust(
        y.data_ptr(), None if gain is None else gain.data_ptr() + step * row, shift.data_ptr() + step * row,
        None if added is None else added.data_ptr(), y.numel() // channels, channels,
        y.numel() // shift.numel() if by_sample else 0,
    )  # fmt: skip
    varying = [
        varying
        for name, table in (("gain", gain), ("shift", shift))
        if table is not None and not by_sample
        for varying in _varying_row(arguments, name, table, row)
    ]
    call(Operation.ADJUST, arguments, [y, *tables, *([] if added is None else [added])], [y], varying=varying)
    return y


def varying_fields(
    arguments: ctypes.Structure,
    quantizer: Quantizer,
    names: tuple[str, str] = ("scale", "zero_point"),
) -> list[Varying]:
    """Return what depends on the step in two fields of arguments that hold a quantizer."""
    if recording.active() is None:
        return []
    place = ctypes.addressof(arguments)
    scale, zero_point = (place + getattr(type(arguments), name).offset for name in names)
    return varying_at(scale, zero_point, quantizer)


def varying_address(arguments: ctypes.Structure, name: str, tensor: Tensor) -> list[Varying]:
    """Return what depends on the step in a field of arguments that holds the address of a tensor."""
    recorder = recording.active()
    if recorder is None:
        return []
    return recorder.address_of(tensor, ctypes.addressof(arguments) + getattr(type(arguments), name).offset)


def _varying_row(arguments: ctypes.Structure, name: str, table: Tensor, row: int) -> list[Varying]:
    """Return what depends on the step in a field that holds the address of a row of a table."""
    if recording.active() is None or table.numel() * 4 == row:
        return varying_address(arguments, name, table)
    start = table.data_ptr()
    field = ctypes.addressof(arguments) + getattr(type(arguments), name).offset
    return [Varying(field, 8, lambda step, _: start + step * row)]


def varying_at(scale: int, zero_point: int, quantizer: Quantizer) -> list[Varying]:
    """Return what depends on the step at the addresses of a scale and a zero point."""
    table = getattr(quantizer, "table", None)
    if table is None:
        recorder = recording.active()
        assert recorder is not None
        recorder.refuse("a quantizer belongs to no table of steps")
        return []
    return [Varying(scale, 4, table.scale_bits), Varying(zero_point, 4, table.zero_point_bits)]


def told_to_profiler(name: str) -> AbstractContextManager[object]:
    """Show a native call to a running profiler, which by itself sees only torch's operators."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


def _integers(values: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


class _Codes:
    """Memory for codes of these shapes, a quantizer each, and what C needs to fill it."""

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        quantizers: Sequence[Quantizer],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        assert len(shapes) == len(quantizers)
        self.tensors = [recording.empty(shape, torch.uint8, memory_format) for shape in shapes]
        self._quantizers, count = quantizers, len(quantizers)
        self._scales = (ctypes.c_float * count)(*(scale for scale, _ in quantizers))
        self._zero_points = (ctypes.c_int32 * count)(*(zero for _, zero in quantizers))
        self._addresses = (ctypes.c_void_p * count)(*(codes.data_ptr() for codes in self.tensors))
        self._pointers = Quantizers(
            *(ctypes.addressof(array) for array in (self._scales, self._zero_points, self._addresses))
        )

    @property
    def address(self) -> int:
        """Where C finds all of it."""
        return ctypes.addressof(self._pointers)

    def varying(self) -> list[Varying]:
        """Return what depends on the step."""
        if recording.active() is None:
            return []
        scales, zero_points = ctypes.addressof(self._scales), ctypes.addressof(self._zero_points)
        return [
            varying
            for place, quantizer in enumerate(self._quantizers)
            for varying in varying_at(scales + 4 * place, zero_points + 4 * place, quantizer)
        ]
