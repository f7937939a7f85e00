"""Where a run is tapped: before every denoiser call, and between the pipeline and its scheduler."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from errata.correct.conflicts import conflict
from errata.correct.corrector import Correction, Corrector, StepView
from errata.correct.device_sync import HostTimesteps, is_free_to_read
from errata.correct.evaluations import Evaluations
from errata.correct.fresh_noise import FreshNoise
from errata.correct.guidance import Recogniser, is_timestep_passed_on
from errata.correct.noise_levels import NoiseLevels
from errata.correct.preview import SchedulerStep, replaced, shifted
from errata.correct.stats import RunStats, StepRecord, StepStats, changed_kind, check_finite, is_whole
from errata.correct.step_rule import is_linear
from errata.errors import PlanError
from errata.runtime.run import CallView, Evaluation, Run, UNetCall
from errata.runtime.schedule import StepKind

__all__ = ["SchedulerHook", "decide", "run_stats"]


def decide(correctors: Sequence[Corrector], view: CallView) -> Evaluation:
    """How a call is made: as scheduled, unless a corrector wants it otherwise; the last one that does."""
    chosen = Evaluation(kind=view.kind)
    for corrector in correctors:
        asked = corrector.before_call(view)
        if asked is not None:
            chosen = asked
            view = replace(view, kind=chosen.kind, reads=chosen.reads)
    return chosen


class SchedulerHook:
    """Stands between the pipeline and its scheduler for one run.

    Args:
        correctors: in the order in which they act.
        levels: for evaluations at other steps; None where they are not known.
        noise: for correctors that draw some.
        guidance_scale: that the pipeline is called with, where it takes one.
    """

    def __init__(
        self,
        run: Run,
        correctors: Sequence[Corrector],
        *,
        levels: NoiseLevels | None,
        noise: FreshNoise,
        guidance_scale: float | None = None,
    ) -> None:
        self._run = run
        self._correctors = correctors
        self._levels, self._noise = levels, noise
        self._is_linear = is_linear(run.pipe.scheduler)
        self._recogniser = Recogniser(run.pipe, asked=guidance_scale)
        self._has_compared = False
        self._timesteps = HostTimesteps()
        self._calls_before = 0
        self._unwatched: list[tuple[int, Tensor]] = []
        self._unfinished: list[StepRecord] = []
        self._finished: dict[int, StepStats] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replaces `step` on the run's own scheduler for the body."""
        scheduler = self._run.pipe.scheduler
        step = scheduler.step
        signature = inspect.signature(step)

        @functools.wraps(step)  # pipelines inspect its signature
        def corrected_step(*args: Any, **kwargs: Any) -> Any:
            calls = tuple(self._run.latest)
            made, self._calls_before = len(self._run.kinds) - self._calls_before, len(self._run.kinds)
            tapping = [
                (place, corrector)
                for place, corrector in enumerate(self._correctors)
                if any(call.step in corrector.taps for call in calls)
            ]
            bound = signature.bind(*args, **kwargs)
            self._watch(calls[0].step, bound.arguments["model_output"])
            if not tapping:
                return step(*args, **kwargs)
            if made != (recorded := self._run.denoiser.schedule.calls_per_step):
                way_out = (
                    "sample with guidance, as it was recorded"
                    if made < recorded
                    else 'such a pipeline cannot be corrected: sample with steps="none"'
                )
                raise PlanError(
                    f"step {calls[0].step}: the pipeline called the network {made} times for one step of the "
                    f"scheduler, {recorded} were recorded; {way_out}"
                )
            time = calls[0].timestep if is_timestep_passed_on(self._run.pipe) else None
            pending = SchedulerStep(
                scheduler,
                step,
                bound,
                timestep=time,
                timesteps=self._timesteps.of(scheduler),
            )
            return self._correct(tapping, calls, pending)

        scheduler.step = corrected_step
        try:
            yield
        finally:
            del scheduler.step

    def finish(self) -> dict[int, StepStats]:
        """Stats of the corrected steps so far, by step; waits for the device.

        Raises:
            ErrataError: a prediction of any step so far is not finite, corrected or not.
        """
        for step, whole in self._unwatched:
            check_finite(step, whole.tolist())
        self._unwatched.clear()
        for record in self._unfinished:
            self._finished |= {stats.step: stats for stats in record.stats()}
        self._unfinished.clear()
        return self._finished

    def _watch(self, step: int, prediction: Tensor) -> None:
        """Sees to it that NaN is told, whatever a method does here; at once where that is free."""
        self._unwatched.append((step, is_whole(prediction)))
        if is_free_to_read(prediction):
            self.finish()

    def _correct(
        self, tapping: Sequence[tuple[int, Corrector]], calls: tuple[UNetCall, ...], pending: SchedulerStep
    ) -> Any:
        guidance = self._recogniser.recognise(
            calls,
            pending.model_output,
            pending.sample,
            pending.scaled(pending.sample),
            compares_values=is_free_to_read(pending.sample) or not self._has_compared,  # else wait once a run
        )
        self._has_compared = True
        evaluations = Evaluations(self._run.denoiser, calls, pending, guidance, self._levels)
        step = calls[0].step

        def noise(place: int, draw: int) -> Tensor:
            # By the scheduler's step, so that guidance in two calls gets the noise of guidance in one.
            per_step = self._run.denoiser.schedule.calls_per_step
            return self._noise.draw(pending.sample, step=step // per_step, place=place, draw=draw)

        view = StepView(
            step=step,
            kind=calls[0].kind,
            sample=pending.sample,
            prediction=pending.model_output,
            features=tuple(call.feature for call in calls if call.feature is not None),
            is_linear=self._is_linear,
            is_guided=guidance.is_guided,
            preview=pending.preview,
            evaluate=evaluations,
            noise=functools.partial(noise, 0),
        )
        corrections = _in_turn(tapping, view, noise)
        if corrections or evaluations.extra:
            self._record(calls, corrections, evaluations.extra, pending)
        for correction in corrections:
            if correction.features is not None:
                self._run.replace_features(correction.features, step=correction.features_step)
        return _taken(pending, corrections)

    def _record(
        self,
        calls: tuple[UNetCall, ...],
        corrections: Sequence[Correction],
        extra: dict[StepKind, float],
        pending: SchedulerStep,
    ) -> None:
        schedule = self._run.denoiser.schedule
        record = StepRecord(
            steps=tuple(call.step for call in calls),
            scheduled=tuple(schedule.kind(call.step) for call in calls),
            made=tuple(call.kind for call in calls),
            extra=extra,
            batch_size=pending.sample.shape[0],
            residuals=[entry for each in corrections for entry in each.residuals],
            diverged=[each.diverged for each in corrections if each.diverged is not None],
            notes={name: values for each in corrections for name, values in each.notes.items()},
            is_finite=is_whole(corrections[-1].prediction) if corrections else None,
        )
        self._unfinished.append(record)
        if is_free_to_read(pending.sample):
            self.finish()


def _in_turn(
    correctors: Sequence[tuple[int, Corrector]], view: StepView, noise: Callable[[int, int], Tensor]
) -> list[Correction]:
    """What each corrector does, given what the ones before it did. Its place in the plan keys its noise."""
    corrections: list[Correction] = []
    for place, corrector in correctors:
        correction = corrector.at_step(replace(view, noise=functools.partial(noise, place)))
        if correction is None:
            continue
        is_new = correction.prev_sample is not None or correction.prediction is not view.prediction
        if is_new and any(earlier.prev_sample is not None for earlier in corrections):
            raise conflict(view.step)
        corrections.append(correction)
        features = view.features if correction.features is None else correction.features
        view = replace(view, prediction=correction.prediction, features=features)
    return corrections


def _taken(pending: SchedulerStep, corrections: Sequence[Correction]) -> Any:
    """The scheduler's step, with what the corrections changed."""
    if not corrections:
        return pending.take(pending.model_output)
    output = pending.take(corrections[-1].prediction)
    replacing = [each.prev_sample for each in corrections if each.prev_sample is not None]
    if replacing:
        output = replaced(output, replacing[-1])
    for correction in corrections:
        if correction.shift is not None:
            output = shifted(output, correction.shift)
    return output


def run_stats(run: Run, corrected: dict[int, StepStats]) -> RunStats:
    """Stats of a finished run, of which some steps were corrected."""
    schedule = run.denoiser.schedule
    steps = tuple(
        corrected.get(step)
        or StepStats(step=step, kind=schedule.kind(step), extra=changed_kind(schedule.kind(step), made))
        for step, made in enumerate(run.kinds)
    )
    return RunStats(batch_size=run.latest[-1].sample.shape[0] if run.latest else 0, steps=steps)
