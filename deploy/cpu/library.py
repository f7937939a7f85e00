"""C code that is compiled for this machine's CPU when it is first needed.

The compiler is the machine's own. Where there is none, or it fails, tensor operations and oneDNN take the
place of the code, and `obstacle` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

_SOURCES = tuple(
    Path(__file__).with_name(name)
    for name in (
        "norm_quantize.c",
        "int8_product.c",
        "int8_tiles.c",
        "attention.c",
        "attention_float.c",
        "operations.c",
    )
)
_HEADERS = tuple(
    Path(__file__).with_name(name)
    for name in (
        "codes.h",
        "int8_outputs.h",
        "int8_product.h",
        "int8_tile_avx2.h",
        "int8_tile_avx512.h",
        "int8_tile_neon.h",
        "int8_tile_sixteen.h",
        "pixel_rows.h",
        "tiles.h",
        "tile_pixels.h",
        "attention.h",
        "attention_flow.h",
        "attention_vectors.h",
        "attention_work.h",
        "attention_products.h",
        "norm_quantize.h",
        "operations.h",
    )
)
# OpenMP's functions are those of the runtime that torch has loaded; one of its own would have other threads.
_NATIVE = "-march=native"
_COMPILE = ("-std=c11", "-O3", _NATIVE, "-fopenmp", "-fPIC", "-ffast-math", "-fno-finite-math-only",
            "-fno-associative-math")  # fmt: skip
# What the C code can make use of on ARM, by its name in /proc/cpuinfo, as compilers call it. The features are
# those that all cores have; "native" may be those of one core.
_ARM_EXTENSIONS = {"asimddp": "dotprod", "i8mm": "i8mm"}
# gcc's scheduling before registers are given out, off on x86, leaves no registers for sums.
_ARM_COMPILE = ("-fno-schedule-insns",)
_LINK = ("-shared",)
_LIBRARIES = ("-lm",)
_PATIENCE = 180


def compile_options(machine: str, features: Collection[str]) -> tuple[str, ...]:
    """Return the options for a kind of machine, as `platform` names it, whose CPU has these features."""
    if machine not in ("aarch64", "arm64"):
        return _COMPILE
    known = [name for feature, name in _ARM_EXTENSIONS.items() if feature in features]
    # Both extensions are of ARMv8.2 or later.
    target = "+".join(("armv8.2-a" if known else "armv8-a", *known))
    return (*(f"-march={target}" if option == _NATIVE else option for option in _COMPILE), *_ARM_COMPILE)


@functools.cache
def obstacle() -> str:
    """Return why there is no native code; empty where there is."""
    try:
        library()
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        return str(error) or type(error).__name__
    return ""


@functools.cache
def library() -> Any:
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
    loaded = ctypes.CDLL(str(file))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    loaded.errata_call.argtypes = [integer, pointer]
    loaded.errata_run.argtypes = [pointer, integer, pointer, integer]
    loaded.errata_tiles_serve.argtypes = [integer]
    loaded.errata_tiles_add.argtypes = [pointer, pointer]
    loaded.errata_int8_product_name.restype = ctypes.c_char_p
    return loaded


def _compile(compiler: str, file: Path) -> None:
    """Make `file`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=file.parent) as work:
        linked = Path(work) / "code.so"
        compiled = [str(Path(work) / f"{source.stem}.o") for source in _SOURCES]
        for command in (
            *(
                [compiler, *_options(), "-c", str(source), "-o", out]
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
        *_options(),
        *_LINK,
        *_LIBRARIES,
        version,
        platform.machine(),
        _cpu(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _options() -> tuple[str, ...]:
    return compile_options(platform.machine(), common_features(_cpu()))


def common_features(cpu: str) -> set[str]:
    """Return the features that every core of an ARM CPU has, from the lines of /proc/cpuinfo."""
    cores = [line.partition(":")[2].split() for line in cpu.splitlines() if line.startswith("Features")]
    return set(cores[0]).intersection(*cores[1:]) if cores else set()


def _cpu() -> str:
    """Return the CPU's features, where the system tells: several machines may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = ("flags", "model name", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(told)))


def _cache_directory() -> Path:
    chosen = os.environ.get("ERRATA_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "errata"
