"""Freed memory is kept for the next tensor; what is held and what is available is known."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from forked import ForkServer

from errata.memory import available_memory

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


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    8000 kB\n"


def test_what_the_system_has_left(tmp_path: Path) -> None:
    assert available_memory(root=written(tmp_path, {"proc/meminfo": MEMINFO})) == 8000 * 1024


def test_nothing_is_known_on_another_system(tmp_path: Path) -> None:
    assert available_memory(root=tmp_path) is None


def test_a_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/user/job"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/user/job/step\n",
        f"{group}/memory.max": "5000000\n",
        f"{group}/memory.current": "3000000\n",
        f"{group}/memory.stat": "anon 1000\ninactive_file 400000\n",
        f"{group}/step/memory.max": "max\n",
        f"{group}/step/memory.current": "3000000\n",
        f"{group}/step/memory.stat": "inactive_file 0\n",
    }
    assert available_memory(root=written(tmp_path, files)) == 5_000_000 - 3_000_000 + 400_000


def test_a_limit_of_an_older_control_group_counts(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory"  # as a container sees its own group
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n",
        f"{group}/memory.limit_in_bytes": "2000000\n",
        f"{group}/memory.usage_in_bytes": "1500000\n",
        f"{group}/memory.stat": "cache 9\ntotal_inactive_file 100\n",
    }
    assert available_memory(root=written(tmp_path, files)) == 500_100


# In a process of its own: another test may have told the C library to keep what is freed.
METERED = """
import torch
from errata.memory import MemoryMeter, peak_memory

meter, size = MemoryMeter(), 64 << 20
meter.restart()
kept = torch.ones(size, dtype=torch.uint8)
grown = meter.growth()
assert grown is not None
assert size <= grown < 1.5 * size
del kept
meter.restart()
assert (meter.growth() or 0) < size
assert peak_memory() >= size
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_meter_sees_what_a_tensor_takes_and_forgets_it() -> None:
    subprocess.run([sys.executable, "-c", METERED], check=True)
