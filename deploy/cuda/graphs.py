"""A network whose calls are captured in CUDA graphs, one for each kind and shape of call, for all steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.runtime.feature_correction import CorrectedOutput
from errata.runtime.replayed_unet import Answer, Inputs, ReplayedUNet, Signature, signature_of
from errata.runtime.unet import BranchedUNet, times_of

_CALLS_BEFORE_CAPTURE = 2


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    outputs: Answer


class GraphedUNet(ReplayedUNet):
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
        self._captured: dict[Signature, _Captured] = {}
        self._is_corrected = any(isinstance(part, CorrectedOutput) for part in self.modules())

    def replayed(self, kind: tuple[str, int], inputs: Inputs, call: Callable[[Inputs], Answer]) -> Answer:
        """See `ReplayedUNet.replayed`."""
        if self._is_corrected and kind[0] == "cached":
            return call(inputs)
        signature = signature_of(kind, inputs)
        if signature not in self._captured:
            self._captured[signature] = _capture(inputs, call)
        captured = self._captured[signature]
        for name, value in inputs.items():
            captured.inputs[name].copy_(value, non_blocking=True)
        captured.graph.replay()
        return captured.outputs

    def times(self, x: Tensor, timestep: float | Tensor) -> Tensor:
        """Return one time for each row, in float32 if it is exact there; a network turns them into it."""
        if isinstance(timestep, Tensor):
            return times_of(x, timestep).contiguous()
        value = float(timestep)
        is_exact = torch.tensor(value, dtype=torch.float32).item() == value
        dtype = torch.float32 if is_exact else torch.float64
        return torch.full((x.shape[0],), value, dtype=dtype, device=x.device)


@torch.no_grad()
def _capture(inputs: Inputs, call: Callable[[Inputs], Answer]) -> _Captured:
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
