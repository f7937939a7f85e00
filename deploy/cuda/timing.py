"""How long the device takes for a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

_CALLS_BEFORE_CAPTURE = 2
_CALLS_PER_GRAPH = 10


class Timer(Protocol):
    """A way to time one call."""

    def prepare(self, call: Callable[[], object]) -> Callable[[], float]:
        """Prepare `call`; return a function that runs it and gives seconds per call, as often as wanted."""


class CudaTimer:
    """Seconds on the device, between events around a CUDA graph of several calls.

    Without a graph a small kernel would be timed by how fast the host launches it, and the way with the
    fewest launches would win whatever the device does.
    """

    def prepare(self, call: Callable[[], object]) -> Callable[[], float]:
        """See `Timer.prepare`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what compiles, or chooses an algorithm, does so before the capture
            for _ in range(_CALLS_BEFORE_CAPTURE):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_CALLS_PER_GRAPH):
                call()

        def seconds() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1000 / _CALLS_PER_GRAPH

        return seconds
