"""The kernels of CUDA: what they need, the layers they build, and their lines in the report."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import torch
from torch import nn

from errata.deploy.cuda.candidates import HALVES, INT_MM
from errata.deploy.cuda.chooser import Chooser
from errata.deploy.cuda.layer import CudaLayer
from errata.deploy.cuda.selection import Fixed, Measured, Selection
from errata.deploy.cuda.store import Key, TimesStore
from errata.deploy.cuda.tables import DeviceStepTable
from errata.deploy.cuda.timing import CudaTimer
from errata.deploy.kernel_registry import (
    AttentionKernel,
    AttentionRequest,
    BackendRow,
    LayerKernel,
    LayerRequest,
    register_attention_kernel,
    register_kernel,
)
from errata.deploy.reference import reference_quantizers
from errata.errors import ArtifactError
from errata.runtime.attention import QuantizedAttention

# What a layer's line says until its first call.
UNCHOSEN = "chosen at the first call of each shape"
# The first whose tensor cores take the int8 tiles that Triton makes (Ampere).
_LEAST_CAPABILITY = (8, 0)
_LEAST_TRITON = (3, 0)


def runtime_layer(request: LayerRequest) -> CudaLayer:
    """Return the layer on CUDA kernels, on the device of the request.

    The request's backend is "triton", or "auto" for the fastest at each shape. Its device is a CUDA device,
    or the CPU in Triton's interpreter.

    Raises:
        ArtifactError: no int8 kernel computes this layer.
    """
    layer, context, tensors = request.scheme, request.context, request.tensors
    tables = [
        DeviceStepTable(tensors[f"{site}.scale"], tensors[f"{site}.zero_point"], context)
        for site in request.sites
    ]
    selection = _selection(request.backend, request.device)
    try:
        made = CudaLayer(
            layer, request.geometry, request.codes(), request.weight_scale, request.bias, tables, selection
        )
    except ValueError as error:
        raise ArtifactError(
            f"no int8 kernel for layer {layer.name!r}: {error}; use backend='reference'"
        ) from error
    made = made.to(request.device)
    # Now, not in the first call, which may be one that is recorded. Tensors name their device with its index.
    context.follow(tables[0].scale.device)
    return made


def follow_choices(unet: nn.Module, rows: list[BackendRow]) -> None:
    """Keep the lines of the layers of `unet` up to date, in `rows` itself, with what is chosen for them."""
    places = {row.layer: place for place, row in enumerate(rows)}
    for module in unet.modules():
        if isinstance(module, CudaLayer) and isinstance(module.selection, Measured):
            place, selection = places[module.scheme.name], module.selection
            selection.on_choice = _Follower(rows, place, selection)


class _Follower:
    """A callback that rewrites one line of a report after a choice."""

    def __init__(self, rows: list[BackendRow], place: int, selection: Measured) -> None:
        self._rows = rows
        self._place = place
        self._selection = selection
        self._rest = rows[place].reason.removeprefix(UNCHOSEN)

    def __call__(self) -> None:
        backend, reason = row_of(self._selection)
        self._rows[self._place] = replace(
            self._rows[self._place], backend=backend, reason=f"{reason}{self._rest}"
        )


def row_of(selection: Measured) -> tuple[str, str]:
    """Return backend and reason of a layer after its latest choice: all shapes so far, with all times."""
    names = {choice.name for choice in selection.choices.values()}
    kinds = {"triton" if name not in (INT_MM, *HALVES) else name for name in names}
    texts = [f"{shape.describe()}: {choice.describe()}" for shape, choice in selection.choices.items()]
    if kinds & set(HALVES):
        texts.append("half precision reads its input unquantized")
    return " / ".join(sorted(kinds)), "; ".join(["fastest at each shape", *texts])


def triton_obstacle(device: torch.device) -> str:
    """Return why Triton's kernels cannot run on `device`; empty where they can.

    On a CPU they run in Triton's interpreter, if `TRITON_INTERPRET=1` was set before triton was imported: for
    tests, thousands of times slower.
    """
    if not _has_triton():
        return "triton is not installed (it comes with CUDA builds of torch)"
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
    """Return device and versions, which measured times depend on."""
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


def _selection(backend: str, device: torch.device) -> Selection:
    if backend == "triton":
        return Fixed()
    has_triton = not triton_obstacle(device)
    return Measured(Chooser(CudaTimer(), TimesStore()), has_triton=has_triton, machine=describe(device))


def _fused_attention(request: AttentionRequest) -> QuantizedAttention:
    query, key, value, _ = reference_quantizers(request)
    return QuantizedAttention(query=query, key=key, value=value, probabilities=None)


# The fastest of several ways, Triton's among them where triton is installed.
CUDA = register_kernel(
    LayerKernel(
        name="cuda",
        rank=40,
        devices=("cuda",),
        backends=("auto",),
        reason=lambda request: UNCHOSEN,
        build=runtime_layer,
        finish=lambda unet, rows, context: follow_choices(unet, rows),
    )
)
# On the CPU in Triton's interpreter, for tests.
TRITON = register_kernel(
    LayerKernel(
        name="triton",
        rank=1,
        devices=("cuda", "cpu"),
        backends=("triton",),
        obstacle=lambda device: triton_obstacle(device),
        build=runtime_layer,
    )
)
CUDA_ATTENTION = register_attention_kernel(
    AttentionKernel(
        name="fused float",
        rank=40,
        devices=("cuda",),
        backends=("auto",),
        reason=lambda request: (
            "query, key and value are quantized to 8 bits; softmax output stays in "
            "floating point, more precise than the scheme"
        ),
        build=_fused_attention,
    )
)
