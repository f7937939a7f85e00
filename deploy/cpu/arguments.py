"""Arguments of the native operations, as the C sources declare and describe them."""

from __future__ import annotations

import ctypes


class NormQuantize(ctypes.Structure):
    """Arguments of `Operation.NORM_QUANTIZE`, as in the C source, which describes the fields."""

    _fields_ = [
        ("sources", ctypes.c_void_p * 2),
        ("channels", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("batch", "pixels", "groups")),
        ("gamma", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("silu", ctypes.c_int32),
        ("parts", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("starts", "widths", "normed", "raw")),
    ]


class LayerNormQuantize(ctypes.Structure):
    """Arguments of `Operation.LAYER_NORM_QUANTIZE`, likewise."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        *((name, ctypes.c_void_p) for name in ("gamma", "beta")),
        ("eps", ctypes.c_float),
        ("count", ctypes.c_int64),
        ("normed", ctypes.c_void_p),
    ]


class Quantize(ctypes.Structure):
    """Arguments of `Operation.QUANTIZE`, likewise."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes")),
        *((name, ctypes.c_int64) for name in ("batch", "pixels", "channels", "padded")),
        *((name, ctypes.c_int64) for name in ("sample_step", "pixel_step", "channel_step")),
        ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32),
    ]


class Adjust(ctypes.Structure):
    """Arguments of `Operation.ADJUST`, likewise."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("y", "gain", "shift", "added")),
        *((name, ctypes.c_int64) for name in ("rows", "channels", "period")),
    ]


class Upsample(ctypes.Structure):
    """Arguments of `Operation.UPSAMPLE`, likewise."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "channels")),
    ]


class Product(ctypes.Structure):
    """Arguments of `Operation.INT8_PRODUCT`, likewise."""

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
        ("before", ctypes.c_void_p),
    ]


class Quantizers(ctypes.Structure):
    """As in the C source."""

    _fields_ = [("scales", ctypes.c_void_p), ("zero_points", ctypes.c_void_p), ("codes", ctypes.c_void_p)]
