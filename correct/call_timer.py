"""Times every denoiser call of a run by itself, without the sampler and everything else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from errata.deploy import DeployedPipeline
from errata.quality.network import device_of
from errata.runtime.schedule import StepKind

KINDS: tuple[StepKind, ...] = ("full", "cached")


class CallTimer:
    """Seconds of the denoiser calls since the last `take`, by kind.

    On CUDA it records events around the calls, and only `take` waits for them; elsewhere it reads a monotonic
    clock before and after.
    """

    def __init__(self) -> None:
        self._calls: dict[StepKind, list[Callable[[], float]]] = {}

    def watch(self, deployed: DeployedPipeline) -> DeployedPipeline:
        """Return a clone of an artifact whose calls are timed; the weights are shared."""
        clone = deployed.clone()
        self._watch_denoiser(clone.denoiser)
        return clone

    def watch_again(self, deployed: DeployedPipeline, num_inference_steps: int) -> DeployedPipeline:
        """Return a watched artifact at another number of steps, watched too."""
        other = deployed.at_steps(num_inference_steps)
        self._watch_denoiser(other.denoiser)
        return other

    def watch_module(self, module: nn.Module) -> Callable[[], None]:
        """Time the calls of a float network as full ones; return a function that ends it."""
        stops: list[Callable[[], Callable[[], float]]] = []
        before = module.register_forward_pre_hook(lambda *_: stops.append(_start(device_of(module))))
        after = module.register_forward_hook(lambda *_: self._note("full", stops.pop()()))

        def remove() -> None:
            before.remove()
            after.remove()

        return remove

    def take(self) -> dict[StepKind, list[float]]:
        """Return the seconds of every call since the last `take`, in order; wait for the device."""
        taken: dict[StepKind, list[float]] = {
            kind: [seconds() for seconds in calls] for kind, calls in self._calls.items()
        }
        self._calls = {}
        return taken

    def _watch_denoiser(self, denoiser: Any) -> None:
        for kind in KINDS:
            setattr(denoiser, kind, self._timed(kind, getattr(denoiser, kind)))

    def _timed(self, kind: StepKind, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            stop = _start(x.device)
            result = call(x, *args, **kwargs)
            self._note(kind, stop())
            return result

        return timed

    def _note(self, kind: StepKind, seconds: Callable[[], float]) -> None:
        self._calls.setdefault(kind, []).append(seconds)


def _start(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start a clock and return a function that stops it, which returns a function that reads it."""
    if device.type == "cuda":
        return _start_on_cuda(device)
    start = time.perf_counter()

    def stop() -> Callable[[], float]:
        seconds = time.perf_counter() - start
        return lambda: seconds

    return stop


def _start_on_cuda(device: torch.device) -> Callable[[], Callable[[], float]]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    start.record(stream)

    def stop() -> Callable[[], float]:
        end.record(stream)

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return read

    return stop
