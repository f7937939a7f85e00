"""What this machine has for int8 on CUDA."""

from __future__ import annotations

import importlib.util
import os

import torch

from errata.deploy.cuda.store import Key

# The first whose tensor cores take the int8 tiles that Triton makes (Ampere).
_LEAST_CAPABILITY = (8, 0)
_LEAST_TRITON = (3, 0)


def triton_obstacle(device: torch.device) -> str:
    """Why Triton's kernels cannot run on `device`; empty where they can.

    On a CPU they run in Triton's interpreter, if `TRITON_INTERPRET=1` was set before triton was imported: for
    tests, thousands of times slower.
    """
    if not _has_triton():
        return "triton is not installed (CUDA builds of torch bring it along)"
    if device.type == "cpu":
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else "Triton's kernels need a CUDA device"
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device, not {device.type}"
    version = _triton_version()
    if tuple(int(number) for number in version.split(".")[:2]) < _LEAST_TRITON:
        return f"triton {version} is installed, {'.'.join(map(str, _LEAST_TRITON))} is needed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        needed = ".".join(map(str, _LEAST_CAPABILITY))
        return (
            f"this device has compute capability {'.'.join(map(str, capability))}; int8 tiles need {needed}"
        )
    return ""


def describe(device: torch.device) -> Key:
    """Device and versions, which measured times depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
        "triton": _triton_version() if _has_triton() else None,
    }


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_version() -> str:
    # The module says it: its distribution has other names in nightly builds.
    import triton

    return str(triton.__version__)
