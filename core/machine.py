"""What a measurement ran on, and the memory and energy that it took."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import errata

_PACKAGES = ("torch", "diffusers", "numpy")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What makes Linux forget the highest resident size of a process so far (man 5 proc).
_FORGET_PEAK = "5"


def describe_machine() -> str:
    """Return processor (and GPU) by name, architecture and operating system."""
    parts = [_processor(), platform.machine(), platform.system()]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(part for part in parts if part)


def versions() -> dict[str, str]:
    """Return the versions of errata, Python and the packages that decide the numbers."""
    return {
        "errata": errata.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@dataclass
class Reading:
    """Peak memory and energy, set when the measured block ends; None where the system does not report it."""

    peak_bytes: int | None = None
    joules: float | None = None


@contextmanager
def metered(device: torch.device) -> Iterator[Reading]:
    """Measure the block and yield the reading, which is filled when the block ends.

    On CUDA: peak allocated memory, and the whole device's energy by NVML (`nvidia-ml-py`). On a CPU: peak
    resident memory of the process (Linux only), which includes everything that is loaded.
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
    """Return the energy since the driver was loaded; None without NVML or without a counter."""
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
