"""Where correctors act on a run: before every denoiser call, and between the pipeline and its scheduler.

`decide` asks them how a call is made. `SchedulerHook` stands in for the scheduler's `step`, and lets them
change what that receives and returns. `Evaluations` runs the denoiser again for them, and counts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from errata.correct.batch_invariance import FreshNoise
from errata.correct.corrector import Correction, Corrector, Features, Method, Rows, StepView, put, take
from errata.correct.device_sync import HostTimesteps, is_free_to_read
from errata.correct.guidance import Guidance, Recogniser
from errata.correct.latent_upscaler import is_timestep_passed_on
from errata.correct.noise_levels import NoiseLevels
from errata.correct.plan_check import check_correction, check_evaluation, conflict
from errata.correct.preview import SchedulerStep
from errata.correct.stats import StepRecord, StepStats, check_finite, is_whole
from errata.correct.step_rule import is_linear
from errata.errors import PlanError
from errata.runtime.denoiser import Denoiser
from errata.runtime.run import CallView, Evaluation, Run, UNetCall
from errata.runtime.schedule import StepKind

Acting = Sequence[tuple[Method, Corrector]]
"""The methods of a plan in order, each with its corrector for this run."""


def decide(acting: Acting, view: CallView) -> Evaluation:
    """Return how to make a call: as the last corrector that decides about it says, else as scheduled.

    Raises:
        PlanError: a corrector decides what its method does not declare.
    """
    chosen = Evaluation(kind=view.kind)
    for method, corrector in acting:
        asked = corrector.before_call(view)
        if asked is not None:
            check_evaluation(method, asked, view)
            chosen = asked
            view = replace(view, kind=chosen.kind, reads=chosen.reads)
    return chosen


class SchedulerHook:
    """Stands between the pipeline and its scheduler for one run.

    Args:
        acting: methods and correctors, in the order in which they act.
        levels: noise levels, for evaluations at other steps; None where they are not known.
        noise: for correctors that draw random numbers.
        guidance_scale: of the pipeline's call, where it takes one.
    """

    def __init__(
        self,
        run: Run,
        acting: Acting,
        *,
        levels: NoiseLevels | None,
        noise: FreshNoise,
        guidance_scale: float | None = None,
    ) -> None:
        self._run = run
        self._acting = acting
        self._levels, self._noise = levels, noise
        self._is_linear = is_linear(run.pipe.scheduler)
        self._recogniser = Recogniser(run.pipe, asked=guidance_scale)
        self._has_compared = False
        self._timesteps = HostTimesteps()
        self._calls_before = 0
        self._unchecked: list[tuple[int, Tensor]] = []
        self._unfinished: list[StepRecord] = []
        self._finished: dict[int, StepStats] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace `step` of the run's own scheduler inside the body."""
        scheduler = self._run.pipe.scheduler
        step = scheduler.step
        signature = inspect.signature(step)

        @functools.wraps(step)  # pipelines inspect its signature
        def corrected_step(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            calls, made = self._new_calls()
            # Every prediction is checked for NaN, whether it is corrected or not.
            self._watch(calls[0].step, bound.arguments["model_output"])
            # A step without correctors is the scheduler's own, untouched.
            at_work = self._at_work(calls)
            if not at_work:
                return step(*args, **kwargs)
            # Correct it, which previews and evaluates as often as the correctors ask, and step once.
            self._check_number_of_calls(made, calls[0].step)
            pending = SchedulerStep(
                scheduler,
                step,
                bound,
                timestep=calls[0].timestep if is_timestep_passed_on(self._run.pipe) else None,
                timesteps=self._timesteps.of(scheduler),
            )
            return self._correct(at_work, calls, pending)

        scheduler.step = corrected_step
        try:
            yield
        finally:
            del scheduler.step

    def finish(self) -> dict[int, StepStats]:
        """Return the stats of the corrected steps so far, by step; wait for the device.

        Raises:
            ErrataError: a prediction of any step so far is not finite, corrected or not.
        """
        for step, whole in self._unchecked:
            check_finite(step, whole.tolist())
        self._unchecked.clear()
        for record in self._unfinished:
            self._finished |= {stats.step: stats for stats in record.stats()}
        self._unfinished.clear()
        return self._finished

    def _new_calls(self) -> tuple[tuple[UNetCall, ...], int]:
        """Return the latest calls, as many as a step should take, and how many the pipeline really made."""
        made, self._calls_before = len(self._run.kinds) - self._calls_before, len(self._run.kinds)
        return tuple(self._run.latest), made

    def _at_work(self, calls: Sequence[UNetCall]) -> list[tuple[int, Method, Corrector]]:
        """Return the correctors that act at these calls, with their places in the plan."""
        return [
            (place, method, corrector)
            for place, (method, corrector) in enumerate(self._acting)
            if any(call.step in corrector.taps for call in calls)
        ]

    def _check_number_of_calls(self, made: int, step: int) -> None:
        recorded = self._run.denoiser.schedule.calls_per_step
        if made == recorded:
            return
        advice = (
            "sample with guidance, as it was recorded"
            if made < recorded
            else "such a pipeline cannot be corrected; sample without correction"
        )
        raise PlanError(
            f"step {step}: the pipeline called the network {made} times for one step of the scheduler, "
            f"{recorded} were recorded; {advice}"
        )

    def _watch(self, step: int, prediction: Tensor) -> None:
        """Note a prediction, to report NaN in it; report at once where reading it costs no wait."""
        self._unchecked.append((step, is_whole(prediction)))
        if is_free_to_read(prediction):
            self.finish()

    def _correct(
        self,
        at_work: Sequence[tuple[int, Method, Corrector]],
        calls: tuple[UNetCall, ...],
        pending: SchedulerStep,
    ) -> Any:
        # Find out how the pipeline got from the network's outputs to this prediction.
        guidance = self._recogniser.recognise(
            calls,
            pending.model_output,
            pending.sample,
            pending.scaled(pending.sample),
            compares_values=is_free_to_read(pending.sample) or not self._has_compared,  # else wait once a run
        )
        self._has_compared = True
        # Let each corrector see what the ones before it made.
        evaluations = Evaluations(self._run.denoiser, calls, pending, guidance, self._levels)
        noise = functools.partial(self._draw, pending.sample, calls[0].step)
        view = StepView(
            step=calls[0].step,
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
        corrections = _in_turn(at_work, view, noise)
        # Keep what they did, for the statistics and for the cached steps that follow.
        if corrections or evaluations.extra:
            schedule, batch_size = self._run.denoiser.schedule, len(pending.sample)
            self._unfinished.append(
                StepRecord.of(calls, corrections, evaluations.extra, schedule=schedule, batch_size=batch_size)
            )
            if is_free_to_read(pending.sample):
                self.finish()
        for correction in corrections:
            if correction.features is not None:
                self._run.replace_features(correction.features, step=correction.features_step)
        # Take the scheduler's step, once.
        return pending.take_corrected(corrections)

    def _draw(self, sample: Tensor, step: int, place: int, draw: int) -> Tensor:
        # By the scheduler's step, so that guidance in two calls gets the noise of guidance in one.
        per_step = self._run.denoiser.schedule.calls_per_step
        return self._noise.draw(sample, step=step // per_step, place=place, draw=draw)


def _in_turn(
    at_work: Sequence[tuple[int, Method, Corrector]], view: StepView, noise: Callable[[int, int], Tensor]
) -> list[Correction]:
    """Return what each corrector does, given what the ones before it did. Its place keys its noise."""
    corrections: list[Correction] = []
    for place, method, corrector in at_work:
        correction = corrector.at_step(replace(view, noise=functools.partial(noise, place)))
        if correction is None:
            continue
        check_correction(method, correction, view)
        is_new = correction.prev_sample is not None or correction.prediction is not view.prediction
        if is_new and any(earlier.prev_sample is not None for earlier in corrections):
            raise conflict(view.step)
        corrections.append(correction)
        features = view.features if correction.features is None else correction.features
        view = replace(view, prediction=correction.prediction, features=features)
    return corrections


class Evaluations:
    """`StepView.evaluate` of one sampling step, see `errata.correct.corrector.Evaluate`.

    The conditioning is that of the step's own calls, also when another step is evaluated.

    Attributes:
        extra: evaluations so far, by kind, as parts of the batch.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        calls: Sequence[UNetCall],
        pending: SchedulerStep,
        guidance: Guidance,
        levels: NoiseLevels | None,
    ) -> None:
        self._denoiser, self._calls = denoiser, calls
        self._pending, self._guidance, self._levels = pending, guidance, levels
        self._features = tuple(call.feature for call in calls if call.feature is not None)
        self.extra: dict[StepKind, float] = {}

    def __call__(
        self, samples: Tensor, rows: Rows = None, *, step: int | None = None
    ) -> tuple[Tensor, Features]:
        """Do what `Evaluate` says."""
        chosen = take(samples, rows)
        scaled = self._scaled(chosen, step)
        first = self._calls[0].step if step is None else step
        raws: list[Tensor] = []
        features: list[Tensor] = []
        for index, call in enumerate(self._calls):
            raw, feature = self._evaluate(scaled, rows, call, step=first + index)
            raws.append(raw)
            if feature is not None:
                network_rows = self._guidance.network_rows(rows, call)
                features.append(put(self._features[index], network_rows, feature))
        if step is None:
            self._features = tuple(features)
        self.extra["full"] = self.extra.get("full", 0.0) + len(raws) * len(chosen) / len(samples)
        wide = torch.promote_types(raws[0].dtype, torch.float32)
        prediction = self._guidance.prediction([raw.to(wide) for raw in raws], chosen, step=first)
        return prediction, tuple(features)

    def _evaluate(
        self, scaled: Tensor, rows: Rows, call: UNetCall, *, step: int
    ) -> tuple[Tensor, Tensor | None]:
        x = self._guidance.expand(scaled, rows, call)
        return self._denoiser.full(x, step, self._guidance.conditioning(rows, call))

    def _scaled(self, samples: Tensor, step: int | None) -> Tensor:
        if step is None:
            return self._pending.scaled(samples)
        if self._levels is None:
            raise PlanError(
                f"step {step} cannot be evaluated ahead: the noise levels of this scheduler are not known; "
                "choose a method that needs none, such as IEC or Forecast"
            )
        return self._levels.scaled(samples, step)
