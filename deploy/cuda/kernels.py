"""The Triton kernels: activations to codes, and the int8 product as an implicit GEMM.

This module imports triton, so it is itself imported only where a kernel is launched (`operators`).

Symbols: `q` activation code in [0, 255], `z` its zero point, `s` its scale, `w` weight code, `s_w` its scale.
The tensor cores multiply signed bytes, so what is stored of an activation is `q - 128`. Then

    Σ (q - z) w  =  Σ (q - 128) w  -  (z - 128) Σ w

holds in integers, and with `|Σ (q - z) w| <= 255 · 127 · K` in 32 bits (see `operators.LARGEST_SUM`). A
padded pixel counts as real zero: its code is `z`, stored as `z - 128`, and the identity takes it out again.

Scale and zero point are read from tables on the device, at the step that a tensor on the device holds: the
program is the same at every step.

Arguments carry no types: Triton evaluates annotations and knows its own only.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# 1.5 · 2^23: adding it to a float32 below 2^22 leaves no bits behind the point, rounded half to even.
_ROUNDER = tl.constexpr(12582912.0)
# How int4 codes lie, see `weights.pack_groups`: a byte holds codes that are half a group apart.
_GROUP = tl.constexpr(64)
_HALF_GROUP = tl.constexpr(32)


@triton.jit
def quantize_kernel(
    x,
    codes,
    scales,
    zero_points,
    step,
    pixels,
    channels,
    plane,
    width,
    stride_image,
    stride_y,
    stride_x,
    stride_channel,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Write `q - 128` of `x`, whose layout the strides say, as int8 `(pixels, channels)`, row-major.

    The division is IEEE's: Triton's own is allowed to be wrong in the last bits, and moves codes at ties.
    """
    index = tl.load(step)
    scale = tl.load(scales + index)
    zero_point = tl.load(zero_points + index).to(tl.float32)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    rest = pixel % plane
    start = (pixel // plane) * stride_image + (rest // width) * stride_y + (rest % width) * stride_x
    source = x + start[:, None] + (channel * stride_channel)[None, :]
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    value = tl.div_rn(value, scale) + zero_point
    # Clamped first, one code too far on either side, so that the rounding below is exact.
    value = tl.minimum(tl.maximum(value, -1.0), 256.0)
    value = (value + _ROUNDER) - _ROUNDER
    value = tl.minimum(tl.maximum(value, 0.0), 255.0)
    stored = (value.to(tl.int32) - 128).to(tl.int8)
    tl.store(codes + pixel[:, None] * channels + channel[None, :], stored, mask=inside)


@triton.jit
def product_kernel(
    codes,
    weight,
    column_sum,
    weight_scale,
    bias,
    residual,
    output,
    scales,
    zero_points,
    step,
    rows,
    channels,
    out_channels,
    height,
    width,
    out_height,
    out_width,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_INT4: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute a convolution as `(rows, taps · channels) x (taps · channels, out_channels)`.

    The left factor is never written down: a tile of it is gathered from `codes`, `(B, H, W, C)`, tap by tap.
    A linear layer, or a 1x1 convolution, is the case of one tap.
    """
    index = tl.load(step)
    shift = tl.load(zero_points + index).to(tl.int32) - 128
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < rows
    is_column = column < out_channels
    image = (row // (out_height * out_width)) * height * width
    top = ((row // out_width) % out_height) * STRIDE_H - PADDING_H
    left = (row % out_width) * STRIDE_W - PADDING_W
    blocks = tl.cdiv(channels, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for turn in range(0, KERNEL_H * KERNEL_W * blocks):
        tap = turn // blocks
        first = (turn % blocks) * BLOCK_K
        y = top + (tap // KERNEL_W) * DILATION_H
        x = left + (tap % KERNEL_W) * DILATION_W
        is_pixel = is_row & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        pixel = codes + ((image + y * width + x) * channels)[:, None]
        if IS_INT4:
            half = tl.arange(0, _HALF_GROUP)
            low = first + half
            high = low + _HALF_GROUP
            byte = column * (KERNEL_H * KERNEL_W * blocks * _HALF_GROUP) + turn * _HALF_GROUP
            pairs = weight + byte[None, :] + half[:, None]
            pair = tl.load(pairs, mask=is_column[None, :], other=0).to(tl.int32)
            # Two's complement nibbles: up to the sign bit and back.
            low_weight = ((pair << 28) >> 28).to(tl.int8)
            high_weight = (pair >> 4).to(tl.int8)
            low_mask = is_pixel[:, None] & (low < channels)[None, :]
            high_mask = is_pixel[:, None] & (high < channels)[None, :]
            low_codes = tl.load(pixel + low[None, :], mask=low_mask, other=shift.to(tl.int8))
            high_codes = tl.load(pixel + high[None, :], mask=high_mask, other=shift.to(tl.int8))
            total = tl.dot(low_codes, low_weight, total)
            total = tl.dot(high_codes, high_weight, total)
        else:
            channel = first + tl.arange(0, BLOCK_K)
            is_channel = channel < channels
            # Beyond the last channel the weight is zero, so the code there does not count.
            tile_mask = is_pixel[:, None] & is_channel[None, :]
            tile = tl.load(pixel + channel[None, :], mask=tile_mask, other=shift.to(tl.int8))
            place = column * (KERNEL_H * KERNEL_W * channels) + tap * channels
            weight_mask = is_column[None, :] & is_channel[:, None]
            factor = tl.load(weight + place[None, :] + channel[:, None], mask=weight_mask, other=0)
            total = tl.dot(tile, factor, total)
    total -= shift * tl.load(column_sum + column, mask=is_column, other=0)[None, :]
    factor_back = tl.load(scales + index) * tl.load(weight_scale + column, mask=is_column, other=0.0)
    result = total.to(tl.float32) * factor_back[None, :]
    if HAS_BIAS:
        result += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    target = row[:, None] * out_channels + column[None, :]
    target_mask = is_row[:, None] & is_column[None, :]
    if HAS_RESIDUAL:
        result += tl.load(residual + target, mask=target_mask, other=0.0).to(tl.float32)
    tl.store(output + target, result.to(output.dtype.element_ty), mask=target_mask)
