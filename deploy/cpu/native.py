"""C code that is compiled for this machine's CPU when it is first needed.

Between two int8 products lie group normalization, SiLU and quantization. As tensor operations each is a pass
over memory; `norm_quantize.c` does them in two. `int8_product.c` has the products themselves, for CPUs with
AVX512-VNNI. The compiler is the machine's own; where there is none, or it fails, tensor operations and oneDNN
take their place, and `obstacle` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

_SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in ("norm_quantize.c", "int8_product.c", "int8_tiles.c", "attention.c")
)
_HEADERS = tuple(
    Path(__file__).with_name(name)
    for name in ("codes.h", "int8_product.h", "tiles.h", "attention.h", "attention_products.h")
)
# OpenMP's functions are those of the runtime that torch has loaded; one of its own would have other threads.
_COMPILE = ("-std=c11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-ffast-math", "-fno-finite-math-only",
            "-fno-associative-math")  # fmt: skip
_LINK = ("-shared",)
_LIBRARIES = ("-lm",)
_PATIENCE = 60  # seconds


@functools.cache
def obstacle() -> str:
    """Return why there is no native code; empty where there is."""
    try:
        _library()
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return str(error) or type(error).__name__
    return ""


def product_obstacle() -> str:
    """Return why `int8_product` cannot be called; empty where it can."""
    if reason := obstacle():
        return reason
    return "" if hasattr(_library(), "errata_int8_product") else "this CPU has no AVX512-VNNI"


def has_tiles() -> bool:
    """Return whether this CPU has AMX, and the system lets this process use it."""
    return not obstacle() and bool(_library().errata_has_tiles())


def tiles_serve(channels: int) -> bool:
    """Return whether tiles multiply so many channels faster than vectors."""
    return bool(_library().errata_tiles_serve(channels))


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
    with told_to_profiler("errata::norm_quantize"):
        failed = _library().errata_norm_quantize(
            x.data_ptr(), batch, height * width, channels, norm.num_groups,
            norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps, int(silu),
            len(widths), _integers(starts), _integers(tuple(widths)),
            ctypes.byref(normed_codes.pointers), ctypes.byref(raw_codes.pointers) if raw else None,
        )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for the sums of a group normalization of {tuple(x.shape)}")
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
    with told_to_profiler("errata::norm_quantize"):
        failed = _library().errata_layer_norm_quantize(
            x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], norm.weight.data_ptr(), norm.bias.data_ptr(),
            norm.eps, len(quantizers), ctypes.byref(codes.pointers),
        )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for a row of a layer normalization of {tuple(x.shape)}")
    return codes.tensors


class Product(ctypes.Structure):
    """Arguments of `int8_product`, as in the C source, which describes the fields."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "weight", "scales", "sums", "bias", "added", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
        *((name, ctypes.c_int64) for name in ("out_height", "out_width", "outputs")),
        *((name, ctypes.c_int64) for name in ("kernel_height", "kernel_width", "top", "left")),
        *((name, ctypes.c_int64) for name in ("down", "right", "spread_y", "spread_x")),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
        ("is_bfloat16", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("out_scale", ctypes.c_float),
        ("out_zero_point", ctypes.c_int32),
        ("is_tiled", ctypes.c_int32),
    ]


def int8_product(product: Product) -> None:
    """Fill the memory at `product.out`.

    Raises:
        MemoryError: there is not enough for one pixel of codes.
    """
    with told_to_profiler("errata::int8_product"):
        failed = _library().errata_int8_product(ctypes.byref(product))
    if failed:
        raise MemoryError("no memory for one pixel of codes")


def told_to_profiler(name: str) -> AbstractContextManager[object]:
    """Show a native call to a running profiler, which by itself sees only torch's operators."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext()


@functools.lru_cache(maxsize=1 << 12)
def _integers(values: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


class _Quantizers(ctypes.Structure):
    """As in the C source."""

    _fields_ = [("scales", ctypes.c_void_p), ("zero_points", ctypes.c_void_p), ("codes", ctypes.c_void_p)]


class _Codes:
    """Memory for codes of these shapes, a quantizer each, and what C needs to fill it."""

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        quantizers: Sequence[tuple[float, int]],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        assert len(shapes) == len(quantizers)
        self.tensors = [
            torch.empty(tuple(shape), dtype=torch.uint8, memory_format=memory_format) for shape in shapes
        ]
        self._constants = _constants(tuple(quantizers))
        self._addresses = (ctypes.c_void_p * len(quantizers))(*(codes.data_ptr() for codes in self.tensors))
        self.pointers = _Quantizers(
            *(ctypes.addressof(array) for array in (*self._constants, self._addresses))
        )


# Of each layer and step.
@functools.lru_cache(maxsize=1 << 16)
def _constants(quantizers: tuple[tuple[float, int], ...]) -> tuple[Any, Any]:
    """Return scales and zero points, as C reads them."""
    count = len(quantizers)
    scales = (ctypes.c_float * count)(*(scale for scale, _ in quantizers))
    return scales, (ctypes.c_int32 * count)(*(zero for _, zero in quantizers))


def library() -> Any:
    """Return the compiled library, whose functions have no types yet but those used here; raises as there."""
    return _library()


@functools.cache
def _library() -> Any:
    """Return the compiled library.

    Raises:
        OSError: no compiler, or no place for its product.
        SubprocessError: the compiler failed.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler (cc, gcc or clang) on the PATH")
    folder = _cache_directory()
    file = folder / f"cpu-{_identity(compiler)}.so"
    if not file.is_file():
        _compile(compiler, file)
    library = ctypes.CDLL(str(file))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.errata_norm_quantize.argtypes = [
        pointer, *[integer] * 4, pointer, pointer, ctypes.c_float, ctypes.c_int, integer, *[pointer] * 4
    ]  # fmt: skip
    library.errata_layer_norm_quantize.argtypes = [
        pointer, integer, integer, pointer, pointer, ctypes.c_float, integer, pointer
    ]  # fmt: skip
    library.errata_tiles_serve.argtypes = [integer]
    return library


def _compile(compiler: str, file: Path) -> None:
    """Make `file`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=file.parent) as work:
        linked = Path(work) / "code.so"
        compiled = [str(Path(work) / f"{source.stem}.o") for source in _SOURCES]
        for command in (
            *(
                [compiler, *_COMPILE, "-c", str(source), "-o", out]
                for source, out in zip(_SOURCES, compiled, strict=True)
            ),
            [compiler, *_LINK, *compiled, *_LIBRARIES, "-o", str(linked)],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise OSError(f"{compiler} failed: {reason}")
        linked.replace(file)


def _identity(compiler: str) -> str:
    """Return a digest of everything that the product depends on: source, options, compiler, CPU."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=_PATIENCE, check=True
    ).stdout
    parts = (
        *(source.read_text() for source in (*_SOURCES, *_HEADERS)),
        *_COMPILE,
        *_LINK,
        *_LIBRARIES,
        version,
        platform.machine(),
        _cpu(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu() -> str:
    """Return the CPU's features, where the system tells: several machines may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("flags", "model name"))))


def _cache_directory() -> Path:
    chosen = os.environ.get("ERRATA_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "errata"
