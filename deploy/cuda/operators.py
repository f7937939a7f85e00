"""The Triton kernels as operators of torch.

An operator of `torch.library` is one node in whatever torch.compile makes, with any compiler behind it, and
can be captured in a CUDA graph. Triton is imported at the first launch.

**Why the codes are made by a kernel of their own** and not in the product's prologue: a 3x3 convolution reads
every input pixel nine times for each tile of output channels, so a prologue would divide and round nine times
and more, and load two to four bytes each time instead of one. It would also force the tile through registers,
where bytes go from global memory to the tensor cores' shared memory without passing any. The price is one
launch and one write of a byte per element; a CUDA graph hides most of the launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from errata.deploy.cuda.window import Window

# |(q - z) w| of one product, and what a 32-bit sum of them holds.
LARGEST_PRODUCT = 255 * 127
LARGEST_SUM = 2**31 - 1
# Offsets in the kernels are 32-bit.
LARGEST_TENSOR = 2**31 - 1
_QUANTIZE_BLOCK = (32, 128)


@torch.library.custom_op("errata::activation_codes", mutates_args=())
def activation_codes(x: Tensor, scales: Tensor, zero_points: Tensor, step: Tensor) -> Tensor:
    """Return the codes of `x` at a step, less 128.

    Args:
        x: `(B, H, W, C)`, float16, bfloat16 or float32, with any strides.
        scales: float32, `(T,)`.
        zero_points: int32, `(T,)`, 0 to 255.
        step: int64, `(1,)`.

    Returns:
        int8, `(B, H, W, C)`, contiguous. They are those of `errata.runtime.ranges.quantize` on `x`
        in float32, bit for bit. NaN has no code.

    Raises:
        ValueError: more elements than 32-bit offsets reach.
    """
    from triton import cdiv

    from errata.deploy.cuda.kernels import quantize_kernel

    _check_size("input", x)
    batch, height, width, channels = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    pixels = batch * height * width
    block_pixels, block_channels = _QUANTIZE_BLOCK
    grid = (cdiv(pixels, block_pixels), cdiv(channels, block_channels))
    with torch.cuda.device_of(x):
        quantize_kernel[grid](
            x, codes, scales, zero_points, step, pixels, channels, height * width, width, *x.stride(),
            BLOCK_PIXELS=block_pixels, BLOCK_CHANNELS=block_channels, enable_fp_fusion=False,
        )  # fmt: skip
    return codes


@activation_codes.register_fake
def _(x: Tensor, scales: Tensor, zero_points: Tensor, step: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@torch.library.custom_op("errata::int8_product", mutates_args=())
def int8_product(
    codes: Tensor,
    weight: Tensor,
    column_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scales: Tensor,
    zero_points: Tensor,
    step: Tensor,
    window: list[int],
    is_int4: bool,
    dtype: torch.dtype,
    tile: list[int],
) -> Tensor:
    """Convolve codes by codes, and go back to reals: `s s_w Σ (q - z) w + bias + residual`.

    Args:
        codes: int8, `(B, H, W, C)`, contiguous: activation codes less 128.
        weight: codes, see `weights.PartWeight`.
        column_sum: int32, `(O,)`, as there.
        weight_scale: float32, `(O,)`, as there.
        bias: `(O,)`.
        residual: `(B, H', W', O)`, contiguous, of any floating type; added at the end, in float32.
        scales: as in `activation_codes`.
        zero_points: as there.
        step: as there.
        window: kernel, stride, padding, dilation, each vertical, then horizontal.
        is_int4: whether the weight is packed.
        dtype: of the output.
        tile: rows, output channels and channels of a block, warps, stages (`tiles.Tile`).

    Returns:
        `(B, H', W', O)`, contiguous.

    Raises:
        ValueError: more elements than 32-bit offsets reach.
    """
    from triton import cdiv

    from errata.deploy.cuda.kernels import product_kernel

    batch, height, width, channels = codes.shape
    output = _output(codes, column_sum, window, dtype)
    _check_size("input", codes)
    _check_size("output", output)
    _, out_height, out_width, out_channels = output.shape
    rows = batch * out_height * out_width
    block_m, block_n, block_k, warps, stages = tile
    # Blocks of output channels run first: they share their rows of the input in the cache.
    grid = (cdiv(out_channels, block_n), cdiv(rows, block_m))
    with torch.cuda.device_of(codes):
        product_kernel[grid](
            codes, weight, column_sum, weight_scale, bias, residual, output, scales, zero_points, step,
            rows, channels, out_channels, height, width, out_height, out_width, *window,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, IS_INT4=is_int4,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
            enable_fp_fusion=False,
        )  # fmt: skip
    return output


@int8_product.register_fake
def _(
    codes: Tensor,
    weight: Tensor,
    column_sum: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    scales: Tensor,
    zero_points: Tensor,
    step: Tensor,
    window: list[int],
    is_int4: bool,
    dtype: torch.dtype,
    tile: list[int],
) -> Tensor:
    return _output(codes, column_sum, window, dtype)


def window_numbers(window: Window) -> list[int]:
    """Return a window as `int8_product` takes it."""
    return [*window.kernel, *window.stride, *window.padding, *window.dilation]


def _output(codes: Tensor, column_sum: Tensor, numbers: list[int], dtype: torch.dtype) -> Tensor:
    kernel, stride, padding, dilation = zip(numbers[::2], numbers[1::2], strict=True)
    window = Window(kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    batch, height, width, _ = codes.shape
    shape = (batch, *window.output_size(height, width), column_sum.shape[0])
    return torch.empty(shape, dtype=dtype, device=codes.device)


def _check_size(name: str, x: Tensor) -> None:
    # Strides, not elements: a view may reach further than it has elements.
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if reach > LARGEST_TENSOR:
        raise ValueError(
            f"the {name} {list(x.shape)} spans {reach} elements; the kernel takes at most {LARGEST_TENSOR}; "
            "use a smaller batch"
        )
