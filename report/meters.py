"""Peak memory and energy of a stretch of work, where the system tells them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What makes Linux forget the highest resident size of a process so far (man 5 proc).
_FORGET_PEAK = "5"


@dataclass
class Reading:
    """Filled when the stretch is over; None where nothing tells it."""

    peak_bytes: int | None = None
    joules: float | None = None


@contextmanager
def metered(device: torch.device) -> Iterator[Reading]:
    """Reads what happens inside.

    On CUDA: the highest allocated memory of the device, and its energy by NVML (`nvidia-ml-py`), which counts
    everything that the device does. On a CPU: the highest resident size of the process, on Linux; it
    includes all that is loaded.
    """
    reading = Reading()
    before = _start(device)
    yield reading
    if device.type == "cuda":
        reading.peak_bytes = torch.cuda.max_memory_allocated(device)
        after = _millijoules(device)
        reading.joules = None if before is None or after is None else (after - before) / 1e3
    else:
        reading.peak_bytes = _peak_of_process()


def _start(device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return _millijoules(device)
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_FORGET_PEAK, encoding="ascii")
    return None


def _peak_of_process() -> int | None:
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found.group(1)) if found else None


def _millijoules(device: torch.device) -> int | None:
    """Energy since the driver was loaded; None without NVML, or for a device that does not count it."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return int(nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByUUID(uuid)))
    except nvml.NVMLError:
        return None


def _nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
