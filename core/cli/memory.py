"""The most memory that this process has held."""

import sys


def peak_memory() -> int:
    """Bytes of main memory held at most so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_cuda_memory() -> int | None:
    """Bytes of GPU memory that torch held at most so far; None without a GPU in use."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return torch.cuda.max_memory_allocated()
