"""What this process does with memory that was freed, and the most that it has held."""

from __future__ import annotations

import ctypes
import platform
import sys

# Parameters of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 512 * 2**20


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
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_cuda_memory() -> int | None:
    """Return the peak of torch's GPU memory so far, in bytes; None without a GPU in use."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return torch.cuda.max_memory_allocated()
