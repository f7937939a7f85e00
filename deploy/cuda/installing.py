"""What of an artifact runs on CUDA kernels: its layers, and the lines of the report that say so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from errata.deploy.cuda.availability import describe, triton_obstacle
from errata.deploy.cuda.candidates import HALVES, INT_MM
from errata.deploy.cuda.chooser import Chooser
from errata.deploy.cuda.layer import CudaLayer
from errata.deploy.cuda.selection import Fixed, Measured, Selection
from errata.deploy.cuda.store import TimesStore
from errata.deploy.cuda.tables import DeviceStepTable
from errata.deploy.cuda.timing import CudaTimer
from errata.errors import ArtifactError
from errata.runtime.layers import Geometry
from errata.runtime.scheme import LayerScheme, layer_sites
from errata.runtime.step_context import StepContext

if TYPE_CHECKING:
    from errata.deploy.backends import BackendRow

# What a layer's line says until its first call.
UNCHOSEN = "chosen at the first call of each shape"


def runtime_layer(
    module: nn.Conv2d | nn.Linear,
    layer: LayerScheme,
    codes: Tensor,
    tensors: Mapping[str, Tensor],
    *,
    context: StepContext,
    backend: str,
    device: torch.device,
) -> CudaLayer:
    """The layer that takes the place of `module`, on `device`.

    Args:
        module: the float layer, possibly on the meta device.
        layer: how it is quantized; with activations of 8 bits.
        codes: int8, of its weight's shape.
        tensors: of the artifact.
        context: tells the step.
        backend: "triton", or "auto" for the fastest at each shape.
        device: a CUDA device; or the CPU, in Triton's interpreter.

    Raises:
        ArtifactError: no int8 kernel computes this layer.
    """
    tables = [
        DeviceStepTable(tensors[f"{site.name}.scale"], tensors[f"{site.name}.zero_point"], context)
        for site in layer_sites(layer)
    ]
    scale, bias = tensors[f"{layer.name}.weight_scale"], tensors.get(f"{layer.name}.bias")
    try:
        made = CudaLayer(layer, Geometry(module), codes, scale, bias, tables, _selection(backend, device))
    except ValueError as error:
        raise ArtifactError(f"no int8 kernel for layer {layer.name!r}: {error}; use 'reference'") from error
    made = made.to(device)
    # Now, not in the first call, which may be one that is recorded. Tensors name their device with its index.
    context.follow(tables[0].scale.device)
    return made


def follow_choices(unet: nn.Module, rows: list[BackendRow]) -> None:
    """Keeps the lines of the layers of `unet` up to date, in `rows` itself, with what is chosen for them."""
    places = {row.layer: place for place, row in enumerate(rows)}
    for module in unet.modules():
        if isinstance(module, CudaLayer) and isinstance(module.selection, Measured):
            place, selection = places[module.scheme.name], module.selection
            selection.on_choice = _Follower(rows, place, selection)


class _Follower:
    """Rewrites one line of a report after a choice."""

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
    """Backend and reason of a layer after its latest choice: all shapes so far, with all times."""
    names = {choice.name for choice in selection.choices.values()}
    kinds = {"triton" if name not in (INT_MM, *HALVES) else name for name in names}
    texts = [f"{shape.describe()}: {choice.describe()}" for shape, choice in selection.choices.items()]
    if kinds & set(HALVES):
        texts.append("half precision takes its input as it is, not on the 8-bit grid")
    return " / ".join(sorted(kinds)), "; ".join(["fastest at each shape", *texts])


def obstacle(device: torch.device, backend: str) -> str:
    """Why layers cannot run here on these kernels; empty where they can.

    "auto" needs a CUDA device and nothing else, since it can choose among fewer ways.
    """
    if backend == "triton":
        return triton_obstacle(device)
    return "" if device.type == "cuda" else f"no CUDA kernels on {device.type}"


def _selection(backend: str, device: torch.device) -> Selection:
    if backend == "triton":
        return Fixed()
    has_triton = not triton_obstacle(device)
    return Measured(Chooser(CudaTimer(), TimesStore()), has_triton=has_triton, machine=describe(device))
