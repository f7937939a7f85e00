"""What this process does with freed memory, what it holds and has held at most, and what is available."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

# Parameters of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 512 * 2**20
_ROOT = Path("/")
# What makes Linux forget the highest resident size of a process so far (man 5 proc).
_FORGET_PEAK = "5"
# Highest resident size before the system was last told to forget it.
_before_forgetting = [0]


def keep_freed_memory() -> bool:
    """Make the C library keep up to 512 MiB of freed memory for the next tensor, in the whole process.

    glibc gives large freed blocks back to the system, and the system clears every page of the next one before
    it is used: at batch 8, that was 7 % of the time of an int8 evaluation of a DDPM-CIFAR10 network. The
    `errata` command calls this; a program of yours may.

    Returns:
        Whether it was done; False where the C library is another one.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(name, _KEPT) == 1 for name in (_TRIM_THRESHOLD, _MMAP_THRESHOLD))


def peak_memory() -> int:
    """Return the peak of the process's main memory so far, in bytes; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(_before_forgetting[0], peak if sys.platform == "darwin" else 1024 * peak)


def peak_cuda_memory() -> int | None:
    """Return the peak of torch's GPU memory so far, in bytes; None without a GPU in use."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return torch.cuda.max_memory_allocated()


def available_memory(*, root: Path = _ROOT) -> int | None:
    """Return how much more main memory this process can take, in bytes, without swapping; None if unknown.

    The least of what the system has left and what the control groups of the process (of a container or a
    batch job) allow. Linux only.

    Args:
        root: where `/proc` and `/sys` are.
    """
    free = _field(root / "proc/meminfo", "MemAvailable")
    return None if free is None else min([free, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield what each control group above the process has left; cache that can be dropped counts as left."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="ascii").splitlines():
            number, controllers, group = line.split(":", 2)
            if number == "0":
                base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                base = root / "sys/fs/cgroup/memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            # A container may see its own group as the root, and the path of the host in /proc.
            for folder in {base, *(base / part for part in _prefixes(group))}:
                yield from _left_in(folder, *names)


def _prefixes(group: str) -> list[str]:
    parts = [part for part in group.split("/") if part not in ("", "..")]
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _left_in(folder: Path, limit: str, usage: str, dropped: str) -> Iterator[int]:
    try:
        most = (folder / limit).read_text(encoding="ascii").strip()
        used = int((folder / usage).read_text(encoding="ascii"))
        found = re.search(rf"^{dropped} (\d+)$", (folder / "memory.stat").read_text(encoding="ascii"), re.M)
    except (OSError, ValueError):
        return
    if most != "max":
        yield max(0, int(most) - used + (int(found.group(1)) if found else 0))


def _field(file: Path, name: str) -> int | None:
    """Return a number of kilobytes of a file in `/proc`, in bytes; None where it does not say."""
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB$", file.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found.group(1)) if found else None


class MemoryMeter:
    """Measures how far the memory of this process grows beyond what it held when the meter was made.

    On a CPU that is resident memory, where files that are mapped count apart (Linux only); on CUDA torch's
    allocated memory. Everything is relative to the first moment, so that freed memory which the C library
    keeps is not taken for something that is needed no more.

    Attributes:
        available: bytes that were available on the device when the meter was made; None if unknown.
        held: bytes that the process held then.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self._on_cuda = device_type == "cuda"
        self.available = _available_on_cuda() if self._on_cuda else available_memory()
        self._mapped = self._now("RssFile")
        self.held = self._now("VmRSS")

    @property
    def mapped(self) -> int:
        """Bytes of mapped files, such as weights, that came into memory since the meter was made."""
        return max(0, self._now("RssFile") - self._mapped)

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        _before_forgetting[0] = peak_memory()
        with contextlib.suppress(OSError):
            (_ROOT / "proc/self/clear_refs").write_text(_FORGET_PEAK, encoding="ascii")

    def growth(self) -> int | None:
        """Return the peak since `restart` beyond what was held at first, without mapped files, in bytes.

        None if it is not known.
        """
        if self._on_cuda:
            import torch

            return max(0, torch.cuda.max_memory_allocated() - self.held)
        peak = self._now("VmHWM")
        return None if peak == 0 else max(0, peak - self.mapped - self.held)

    def _now(self, name: str) -> int:
        """Return a field of the process's status, in bytes; on CUDA what is allocated. 0 if unknown."""
        if self._on_cuda:
            import torch

            return 0 if name == "RssFile" else torch.cuda.memory_allocated()
        return _field(_ROOT / "proc/self/status", name) or 0


def _available_on_cuda() -> int:
    import torch

    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
