"""What a measurement ran on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

import errata

_PACKAGES = ("torch", "diffusers", "numpy")


def describe_machine() -> str:
    """Processor (and GPU) by name, architecture and operating system."""
    parts = [_processor(), platform.machine(), platform.system()]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(part for part in parts if part)


def versions() -> dict[str, str]:
    """Versions of errata, Python and the packages that decide the numbers."""
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
