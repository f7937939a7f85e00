"""The tap between a pipeline and its scheduler."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from errata.compress.network.run import Run, UNetCall
from errata.compress.recipes.schedule import StepKind
from errata.correct.corrector import Correction, Corrector, Rows, StepView, put, take
from errata.correct.guidance import Guidance, recognise
from errata.correct.preview import SchedulerStep, replaced
from errata.correct.stats import RunStats, StepStats, step_stats
from errata.correct.step_rule import is_linear
from errata.errors import PlanError


class Tap:
    """Stands between the pipeline and its scheduler for one run."""

    def __init__(self, run: Run, corrector: Corrector, steps: tuple[int, ...]) -> None:
        self._run = run
        self._steps = frozenset(steps)
        self._corrector = corrector
        self._is_linear = is_linear(run.pipe.scheduler)
        self._guidance: Guidance | None = None
        self._calls_before = 0
        self._unfinished: list[Callable[[], StepStats]] = []
        self._finished: dict[int, StepStats] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces `step` on the run's own scheduler for the body."""
        scheduler = self._run.pipe.scheduler
        step = scheduler.step
        signature = inspect.signature(step)

        @functools.wraps(step)  # pipelines inspect its signature
        def corrected_step(*args: Any, **kwargs: Any) -> Any:
            call = self._run.last
            calls, self._calls_before = len(self._run.kinds) - self._calls_before, len(self._run.kinds)
            if call is None or call.step not in self._steps:
                return step(*args, **kwargs)
            if calls != 1:
                raise PlanError(
                    f"step {call.step}: the pipeline called the network {calls} times for one step of the "
                    "scheduler; only one call can be corrected yet: sample without guidance, or with "
                    'steps="none"'
                )
            return self._correct(call, SchedulerStep(scheduler, step, signature.bind(*args, **kwargs)))

        scheduler.step = corrected_step
        try:
            yield
        finally:
            del scheduler.step

    def finish(self) -> dict[int, StepStats]:
        """Stats of the corrected steps so far, by step; waits for the device."""
        for summary in self._unfinished:
            stats = summary()
            self._finished[stats.step] = stats
        self._unfinished.clear()
        return self._finished

    def _correct(self, call: UNetCall, pending: SchedulerStep) -> Any:
        on_cpu = pending.sample.device.type == "cpu"
        guidance = self._guidance = recognise(
            call,
            pending.model_output,
            pending.scaled(pending.sample),
            compares_values=on_cpu or self._guidance is None,  # on an accelerator, wait for it once a run
        )
        evaluations = _Evaluations(self._run, call, pending, guidance)
        correction = self._corrector.at_step(
            StepView(
                step=call.step,
                sample=pending.sample,
                prediction=pending.model_output,
                feature=call.feature,
                is_linear=self._is_linear,
                preview=pending.preview,
                evaluate=evaluations,
            )
        )
        if correction is None:
            return pending.take(pending.model_output)
        if correction.feature is not None:
            self._run.feature = correction.feature
        self._record(call, correction, evaluations.extra, pending.sample.shape[0])
        if on_cpu:
            self.finish()
        output = pending.take(correction.prediction)
        return output if correction.prev_sample is None else replaced(output, correction.prev_sample)

    def _record(
        self, call: UNetCall, correction: Correction, extra: dict[StepKind, float], batch_size: int
    ) -> None:
        self._unfinished.append(
            functools.partial(
                step_stats, correction, step=call.step, kind=call.kind, extra=extra, batch_size=batch_size
            )
        )


class _Evaluations:
    """Full calls at one step; counts them. See `StepView.evaluate`."""

    def __init__(self, run: Run, call: UNetCall, pending: SchedulerStep, guidance: Guidance) -> None:
        self._run = run
        self._call = call
        self._pending = pending
        self._guidance = guidance
        self._feature = call.feature
        self.extra: dict[StepKind, float] = {}

    def __call__(self, samples: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        call, guidance = self._call, self._guidance
        batch_size = call.sample.shape[0]
        scaled = self._pending.scaled(take(samples, rows)).to(call.sample.dtype)
        x = guidance.expand(scaled)
        network_rows = guidance.rows(rows, samples.shape[0])
        cond = {
            name: take(value, network_rows) if value.ndim and value.shape[0] == batch_size else value
            for name, value in call.cond.items()
        }
        raw, feature = self._run.denoiser.full(x, call.step, cond)
        if feature is not None:
            assert self._feature is not None  # the step's own full call left one
            self._feature = put(self._feature, network_rows, feature)
        self.extra["full"] = self.extra.get("full", 0.0) + x.shape[0] / batch_size
        return guidance.combine(raw), self._feature


def run_stats(run: Run, corrected: dict[int, StepStats]) -> RunStats:
    """Stats of a finished run, of which some steps were corrected."""
    steps = tuple(
        corrected.get(step) or StepStats(step=step, kind=kind) for step, kind in enumerate(run.kinds)
    )
    return RunStats(batch_size=run.last.sample.shape[0] if run.last is not None else 0, steps=steps)
