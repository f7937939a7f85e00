"""The kernels go through Triton's compiler, NVIDIA's assembler included, for devices that are not here.

The interpreter accepts what the compiler does not, and says nothing of which instructions come out.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from errata.deploy.cuda.tiles import TILES

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels"),
]

AMPERE, HOPPER = 80, 90
TYPES = {
    "codes": "*i8",
    "weight": "*i8",
    "column_sum": "*i32",
    "weight_scale": "*fp32",
    "bias": "*fp32",
    "scales": "*fp32",
    "zero_points": "*i32",
    "step": "*i64",
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def ptx(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], capability: int, **options: int
) -> str:
    """Assembled for a device; addresses and channels are multiples of 16, as in real networks."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*i8") or name in ("channels", "out_channels", "output", "residual")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={**options, "enable_fp_fusion": False},
    )
    assert made.asm["cubin"]
    text: str = made.asm["ptx"]
    return text


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_quantizer_compiles_to_exact_division(dtype: str) -> None:
    from errata.deploy.cuda.kernels import quantize_kernel

    types = {**TYPES, "x": f"*{dtype}"}
    text = ptx(quantize_kernel, types, {"BLOCK_PIXELS": 32, "BLOCK_CHANNELS": 128}, AMPERE)
    assert "div.rn.f32" in text
    assert "fma" not in text  # nothing is contracted that the reference computes apart


@pytest.mark.parametrize(
    ("capability", "name", "is_int4"),
    [
        (AMPERE, "triton 128x128", False),
        (AMPERE, "triton 16x64", True),
        (HOPPER, "triton 64x64", False),
        (HOPPER, "triton 128x128", True),
    ],
)
def test_the_product_compiles_to_int8_tensor_cores(capability: int, name: str, is_int4: bool) -> None:
    from errata.deploy.cuda.kernels import product_kernel

    block_m, block_n, block_k, warps, stages = TILES[name].numbers(is_int4=is_int4)
    window = {"KERNEL_H": 3, "KERNEL_W": 3, "STRIDE_H": 1, "STRIDE_W": 1, "PADDING_H": 1, "PADDING_W": 1}
    constants = {
        **window, "DILATION_H": 1, "DILATION_W": 1, "HAS_BIAS": True, "HAS_RESIDUAL": True,
        "IS_INT4": is_int4, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k,
    }  # fmt: skip
    types = {**TYPES, "residual": "*bf16", "output": "*bf16"}
    text = ptx(product_kernel, types, constants, capability, num_warps=warps, num_stages=stages)
    assert ".s32.s8.s8" in text
    assert "cp.async" in text  # codes reach shared memory without passing registers
