r"""Measure the CPU's attention kernels against torch's, at sizes of real networks.

    OMP_NUM_THREADS=1 python benchmarks/attention.py

All ways to multiply that the compiled code has, and `scaled_dot_product_attention` in float32 and bfloat16,
on the same numbers and from the same memory: channels as projections write them. Each round calls every
variant in turn; the table has medians of CPU time, and the median over rounds of the first one's time to each
one's.

`--build` measures the code for another kind of CPU, by its name in gcc (x86-64-v3 has AVX2, cascadelake
AVX-512 without bfloat16). This CPU needs its instructions. For a fair comparison limit torch to AVX2, too:

    ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
        python benchmarks/attention.py --build x86-64-v3
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from call_timing import Call, interleaved_seconds
from torch import Tensor
from torch.nn import functional

from errata.deploy.cpu import attention_kernel
from errata.machine import describe_machine

# Batch, tokens, heads, width: SD 1.5 at 64x64 latents; a CIFAR-size network with diffusers' default heads.
SHAPES = ((2, 4096, 8, 40), (8, 256, 32, 8))


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description="The CPU's attention kernels against torch's.")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    parser.add_argument("--build", help="a kind of CPU to compile for, in place of this one")
    options = parser.parse_args()
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as work:
        if options.build is not None:
            compile_for(options.build, Path(work))
        for shape in SHAPES:
            measure(shape, options.rounds)


def compile_for(cpu: str, work: Path) -> None:
    """Have the kernels compiled for another kind of CPU."""
    compiler = work / "cc"
    compiler.write_text(f'#!/bin/sh\nexec gcc "$@" -march={cpu}\n')
    compiler.chmod(0o700)
    os.environ["CC"], os.environ["ERRATA_CACHE"] = str(compiler), str(work)


@torch.no_grad()
def measure(shape: tuple[int, int, int, int], rounds: int) -> None:
    """Time all variants at a shape, in turn."""
    batch, tokens, heads, width = shape
    query, key, value = (torch.randn(batch, tokens, heads * width) for _ in range(3))
    halves = tuple(x.bfloat16() for x in (query, key, value))
    variants: dict[str, Call] = {
        "torch float32": lambda: by_torch(query, key, value, heads),
        "torch bfloat16": lambda: by_torch(*halves, heads),
    }
    for kind in attention_kernel.attention_kinds():
        given = (query, key, value) if kind.dtype is torch.float32 else halves
        variants[f"errata {kind.description}"] = lambda given=given, kind=kind: attention_kernel.attention(
            *given, heads=heads, scale=width**-0.5, kind=kind
        )
    seconds = interleaved_seconds(variants, rounds, clock=time.process_time)
    print(f"\nbatch {batch}, {tokens} tokens, {heads} heads of {width}")
    first = next(iter(seconds.values()))
    for name, times in seconds.items():
        ratio = statistics.median(base / one for base, one in zip(first, times, strict=True))
        print(f"{name:<42} {1000 * statistics.median(times):>10.2f} ms {ratio:>6.2f} x")


def by_torch(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Torch's attention of packed heads."""
    split = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


if __name__ == "__main__":
    main()
