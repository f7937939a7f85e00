"""A network whose calls are captured in CUDA graphs, one for each kind and shape of call, for all steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.runtime.feature_correction import CorrectedOutput
from errata.runtime.unet import BranchedUNet

_CALLS_BEFORE_CAPTURE = 2
_Signature = tuple[Any, ...]


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: Any


class GraphedUNet(BranchedUNet):
    """A `BranchedUNet` that records each call once and then replays it.

    The step is not a part of the program: layers read it from the context's tensor, which the denoiser writes
    before a replay. So every step shares a graph. Give it to a `UNetDenoiser`, and set
    `reuses_outputs` there: each replay writes its answers into the same memory.

    Cached calls of a network whose outputs are corrected (`CorrectedOutput`) are made one by one, without a
    graph, because the correction takes its row by a Python number.

    Args:
        branched: the network, on a CUDA device; anywhere else its first call is a ValueError.
    """

    def __init__(self, branched: BranchedUNet) -> None:
        super().__init__(branched.unet)
        self._captured: dict[_Signature, _Captured] = {}
        self._is_corrected = any(isinstance(part, CorrectedOutput) for part in self.modules())

    def full(
        self, x: Tensor, timestep: float | Tensor, cond: Mapping[str, Tensor], *, branch: int
    ) -> tuple[Tensor, Tensor | None]:
        """See `BranchedUNet.full`."""
        plain = super().full
        inputs = {"x": x, "timestep": _time(timestep, x), **_prefixed(cond)}

        def call(given: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            return plain(given["x"], given["timestep"], _conditioning(given), branch=branch)

        answer: tuple[Tensor, Tensor | None] = self._replayed(("full", branch), inputs, call)
        return answer

    def cached(
        self, x: Tensor, timestep: float | Tensor, cond: Mapping[str, Tensor], feature: Tensor, *, branch: int
    ) -> Tensor:
        """See `BranchedUNet.cached`."""
        plain = super().cached
        if self._is_corrected:
            return plain(x, timestep, cond, feature, branch=branch)
        inputs = {"x": x, "timestep": _time(timestep, x), "feature": feature, **_prefixed(cond)}

        def call(given: dict[str, Tensor]) -> Tensor:
            return plain(given["x"], given["timestep"], _conditioning(given), given["feature"], branch=branch)

        answer: Tensor = self._replayed(("cached", branch), inputs, call)
        return answer

    def _replayed(
        self, kind: tuple[str, int], inputs: dict[str, Tensor], call: Callable[[dict[str, Tensor]], Any]
    ) -> Any:
        described = (
            (name, tuple(value.shape), value.stride(), value.dtype) for name, value in inputs.items()
        )
        signature = (*kind, *described)
        if signature not in self._captured:
            self._captured[signature] = _capture(inputs, call)
        captured = self._captured[signature]
        for name, value in inputs.items():
            captured.inputs[name].copy_(value, non_blocking=True)
        captured.graph.replay()
        return captured.outputs


@torch.no_grad()
def _capture(inputs: dict[str, Tensor], call: Callable[[dict[str, Tensor]], Any]) -> _Captured:
    """Make the calls that measure and compile, on a stream of their own, then the one that is recorded."""
    if not inputs["x"].is_cuda:
        raise ValueError(f"CUDA graphs need a network on a CUDA device, this one is on {inputs['x'].device}")
    own = {name: value.to(inputs["x"].device, copy=True) for name, value in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_CALLS_BEFORE_CAPTURE):
            call(own)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(own)
    return _Captured(graph, own, outputs)


def _time(timestep: float | Tensor, x: Tensor) -> Tensor:
    """Return one time for each row: an input of the graph. A network turns whole ones into float32 anyway."""
    if isinstance(timestep, Tensor):
        return timestep.to(x.device).expand(x.shape[0]).contiguous()
    value = float(timestep)
    is_exact = torch.tensor(value, dtype=torch.float32).item() == value
    dtype = torch.float32 if is_exact else torch.float64
    return torch.full((x.shape[0],), value, dtype=dtype, device=x.device)


def _prefixed(cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"cond.{name}": value for name, value in cond.items()}


def _conditioning(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("cond."): value for name, value in given.items() if name.startswith("cond.")}
