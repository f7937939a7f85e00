"""C code compiled for other kinds of CPUs, and run on this one if it has their instructions.

So the paths that a better CPU does not take are tested as well. What was compiled is kept with errata's own.
"""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from errata.deploy.cpu import library

NATIVE = "native"
# By name: what the compiler is told, and what /proc/cpuinfo has to list.
_LEVEL_3 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"}
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
BUILDS = {
    "avx2": ("-march=x86-64-v3", _LEVEL_3),
    "avxvnni": ("-march=x86-64-v3 -mavxvnni", {*_LEVEL_3, "avx_vnni"}),
    "avx512": ("-march=x86-64-v4", {*_LEVEL_3, *_AVX512}),
}


def obstacle(build: str) -> str:
    """Return why a build cannot run here; empty where it can."""
    if build == NATIVE:
        return ""
    if platform.machine() != "x86_64" or library.obstacle():
        return library.obstacle() or "another kind of CPU"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    missing = sorted(BUILDS[build][1].difference(flags))
    return f"this CPU has no {missing[0]}" if missing else ""


@contextmanager
def running(build: str) -> Iterator[None]:
    """Have that build's code called, and no other; skip the test where it cannot run."""
    if reason := obstacle(build):
        pytest.skip(reason)
    if build == NATIVE:
        yield
        return
    folder = library._cache_directory() / "builds" / build
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    folder.mkdir(parents=True, exist_ok=True)
    wrapper = folder / f"cc-{os.getpid()}"
    wrapper.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" {BUILDS[build][0]}\n')
    wrapper.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", str(wrapper))
        patch.setenv("ERRATA_CACHE", str(folder))
        _forget()
        try:
            library.library()
            yield
        finally:
            wrapper.unlink()
            _forget()


def _forget() -> None:
    """Have the library compiled, or found, again."""
    library.library.cache_clear()
    library.obstacle.cache_clear()
