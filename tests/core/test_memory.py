"""Freed memory is kept for the next tensor."""

import platform

import pytest
from forked import ForkServer

SCRIPT = """
import resource, sys, torch
from errata.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def fill():
    for _ in range(10):
        a, b = (torch.ones(10 << 20) for _ in range(2))
        del a, b
torch.set_num_threads(1)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_pages_are_fetched_once(forked: ForkServer) -> None:
    ended = {name: forked.run(SCRIPT, name) for name in ("kept", "given back")}
    assert [program.returncode for program in ended.values()] == [0, 0], ended["kept"].stderr
    faults = {name: int(program.stdout) for name, program in ended.items()}
    assert faults["kept"] * 10 < faults["given back"]
