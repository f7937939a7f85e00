"""The C code compiles for CPUs with fewer instructions than this one."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from errata.deploy.cpu import library

COMPILER = shutil.which("gcc")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no gcc"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="another kind of CPU"),
]
# Neither AVX-512 nor VNNI; AVX2; with VNNI; AVX-512; with VNNI; with bfloat16; with AMX.
CPUS = ("x86-64", "x86-64-v3", "alderlake", "skylake-avx512", "cascadelake", "cooperlake", "sapphirerapids")


@pytest.mark.parametrize("cpu", CPUS)
def test_every_source_compiles(cpu: str, tmp_path: Path) -> None:
    assert COMPILER is not None
    options = [f"-march={cpu}" if option == "-march=native" else option for option in library._COMPILE]
    for source in library._SOURCES:
        command = [COMPILER, *options, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source.name} for {cpu}: {done.stderr[:500]}"
