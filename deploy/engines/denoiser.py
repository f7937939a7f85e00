"""A `Denoiser` that is nothing but exported graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from errata.deploy.engines.onnx_graphs import FEATURE, SAMPLE, STEP
from errata.deploy.engines.session import Session
from errata.runtime.denoiser import Conditioning
from errata.runtime.feature_correction import FeatureCorrection
from errata.runtime.schedule import CacheSchedule, StepKind

_WARM_UP_CALLS, _TIMED_CALLS = 2, 5


class EngineDenoiser:
    """See `Denoiser`. A cached call reads a stored feature through `correction`, where there is one.

    Args:
        graphs: the session of each kind of call; "cached" is there exactly where the schedule has a cache.
        schedule: of the calls of a run.
        timesteps: of those calls; the graphs know them, too.
        correction: of the feature that cached calls read. It stays outside the graph, because it does not
            apply to features that were extrapolated.
    """

    def __init__(
        self,
        graphs: Mapping[StepKind, Session],
        schedule: CacheSchedule,
        timesteps: tuple[float, ...],
        *,
        correction: FeatureCorrection | None = None,
    ) -> None:
        self._graphs = graphs
        self._schedule = schedule
        self._timesteps = timesteps
        self._correction = correction
        self._latest: tuple[Tensor, Conditioning] | None = None
        self._costs: dict[tuple[StepKind, torch.Size], float] = {}

    @property
    def schedule(self) -> CacheSchedule:
        """Which steps a plain run evaluates in full."""
        return self._schedule

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Training time of every recorded call."""
        return self._timesteps

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """See `Denoiser.full`.

        Raises:
            ValueError: the step was not recorded.
            ArtifactMismatch: an input is not as the engine was exported for.
        """
        prediction, *features = self._graphs["full"](self._inputs(x, step, cond))
        self._latest = (x, cond)
        return prediction.to(x.device, x.dtype), features[0].to(x.device) if features else None

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        """See `Denoiser.cached`.

        Raises:
            ValueError: the model has no cache, or the step was not recorded.
            ArtifactMismatch: an input is not as the engine was exported for.
        """
        if not self._schedule.has_cache:
            raise ValueError("this model has no feature cache: every step is a full one")
        inputs = self._inputs(x, step, cond)
        if self._correction is not None and not is_extrapolated:
            feature = self._correction(feature, step)
        (prediction,) = self._graphs["cached"]({**inputs, FEATURE: feature})
        self._latest = (x, cond)
        return prediction.to(x.device, x.dtype)

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        """See `Denoiser.cost`; measured once per shape, both kinds in turn.

        Raises:
            ValueError: no call has been made yet, so no shape is known; or there are no cached calls.
        """
        if kind == "cached" and not self._schedule.has_cache:
            raise ValueError("this model has no feature cache: there is no cached call to measure")
        if self._latest is None:
            raise ValueError(
                "run the pipeline once before asking for a cost: its input shape is not known yet"
            )
        latest = x, cond = self._latest
        if batch_size is not None and batch_size != len(x):
            rows = {spec.name for spec in self._graphs["full"].spec.inputs if None in spec.shape}
            x = _repeated(x, batch_size)
            cond = {
                name: _repeated(value, batch_size) if name in rows else value for name, value in cond.items()
            }
        if (kind, x.shape) not in self._costs:
            self._measure(x, cond)
            self._latest = latest
        return self._costs[kind, x.shape]

    def _measure(self, x: Tensor, cond: Conditioning) -> None:
        _, feature = self.full(x, 0, cond)
        calls: dict[StepKind, Callable[[], object]] = {"full": lambda: self.full(x, 0, cond)}
        if feature is not None:
            calls["cached"] = lambda: self.cached(x, 0, cond, feature)
        seconds: dict[StepKind, list[float]] = {kind: [] for kind in calls}
        for _ in range(_WARM_UP_CALLS + _TIMED_CALLS):
            for kind, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[kind].append(time.perf_counter() - start)
        for kind, times in seconds.items():
            self._costs[kind, x.shape] = statistics.median(times[_WARM_UP_CALLS:])

    def _inputs(self, x: Tensor, step: int, cond: Conditioning) -> dict[str, Tensor]:
        if not 0 <= step < self._schedule.num_steps:
            raise ValueError(f"step {step} was not recorded; allowed are 0 to {self._schedule.num_steps - 1}")
        return {SAMPLE: x, STEP: torch.tensor(step), **cond}


def _repeated(value: Tensor, rows: int) -> Tensor:
    return value[:1].expand(rows, *value.shape[1:])
