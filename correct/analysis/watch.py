"""Records what goes into and comes out of every step of a pipeline's scheduler, while it samples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.correct.analysis.probe import Probe
from errata.correct.attachment import class_with_call
from errata.correct.guidance import Recogniser
from errata.correct.noise_levels import NoiseLevels
from errata.correct.preview import prev_sample_of
from errata.correct.sampling import Inputs
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.runtime.denoiser import Denoiser
from errata.runtime.run import CallView, Evaluation, Run


@dataclass(frozen=True, kw_only=True)
class SamplerStep:
    """One call of `scheduler.step`; the tensors are copies.

    Attributes:
        timestep: as the pipeline passed it.
        sample: x_t, `(B, …)`, as the pipeline holds it (not scaled for the network).
        prediction: what the scheduler was given (guided where the pipeline guides).
        result: x_{t-1}, what the pipeline goes on with.
    """

    timestep: float
    sample: Tensor
    prediction: Tensor
    result: Tensor


OnStep = Callable[[SamplerStep], None]


@contextmanager
def watched(scheduler: Any, on_step: OnStep) -> Iterator[None]:
    """Report every step of `scheduler` inside the body to `on_step`; the scheduler must be a private one.

    A correction that was put in place of `scheduler.step` before is part of what is watched.
    """
    before = vars(scheduler).get("step")
    step = scheduler.step
    signature = inspect.signature(step)

    @functools.wraps(step)  # pipelines inspect its signature
    def watched_step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        sample, prediction = given["sample"].clone(), given["model_output"].clone()
        output = step(*args, **kwargs)
        on_step(
            SamplerStep(
                timestep=float(given["timestep"]),
                sample=sample,
                prediction=prediction,
                result=prev_sample_of(output).clone(),
            )
        )
        return output

    scheduler.step = watched_step
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


class WatchedArtifact(DeployedPipeline):
    """The same artifact; every run on it, corrected or not, reports its steps to `on_step`."""

    def __init__(self, deployed: DeployedPipeline, on_step: OnStep) -> None:
        super().__init__(
            deployed.pipe,
            num_inference_steps=deployed.num_inference_steps,
            manifest=deployed.manifest,
            report=deployed.backend_report(),
        )
        self._on_step = on_step

    def start(
        self,
        *,
        denoiser: Denoiser | None = None,
        decide: Callable[[CallView], Evaluation] | None = None,
        remembers: int = 1,
    ) -> Run:
        """Start a run that is watched, see `SteppedPipeline.start`."""
        run = super().start(denoiser=denoiser, decide=decide, remembers=remembers)
        watch_calls(run.pipe, self._on_step)
        return run


def watch_calls(pipe: DiffusionPipeline, on_step: OnStep) -> None:
    """Make the calls of a private `pipe` report to `on_step`; change `pipe`, but none of its parts.

    The scheduler is watched from the moment of the call, so a correction that was installed before is watched
    too.
    """
    kind = type(pipe)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with watched(self.scheduler, on_step):
            return kind.__call__(self, *args, **kwargs)

    pipe.__class__ = class_with_call(kind, call)
    pipe.set_progress_bar_config(disable=True)


def arguments_for(pipe: DiffusionPipeline, indices: range, *, seed: int, inputs: Inputs) -> Mapping[str, Any]:
    """Return keyword arguments to sample these indices; sample i depends on `seed + i` alone."""
    arguments: dict[str, Any] = {
        "generator": [torch.Generator().manual_seed(seed + index) for index in indices],
        **inputs(indices),
    }
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        arguments.setdefault("output_type", "np")  # nobody looks at the images; PIL is slower
    return arguments


def probes_of(
    deployed: DeployedPipeline, arguments: Mapping[str, Any], chosen: frozenset[int], *, batch_size: int
) -> list[Probe]:
    """Return a probe of each step whose (first) denoiser call is in `chosen`, of a run with `arguments`.

    Raises:
        PlanError: the scheduler's noise levels are not known, or the pipeline does something between network
            and scheduler that is not understood.
        ArtifactMismatchError: another number of steps than recorded.
    """
    levels = NoiseLevels.of(
        deployed.pipe.scheduler,
        deployed.denoiser.timesteps,
        num_inference_steps=deployed.num_inference_steps,
    )
    run = deployed.start()
    run.pipe.set_progress_bar_config(disable=True)
    watcher = _Watcher(run, levels, chosen, batch_size)
    with watched(run.pipe.scheduler, watcher.on_step):
        run.pipe(**deployed.arguments(arguments))
    return watcher.probes


class _Watcher:
    """Receives the steps of a run, and makes a probe of every chosen one."""

    def __init__(self, run: Run, levels: NoiseLevels, chosen: frozenset[int], batch_size: int) -> None:
        self._run, self._levels, self._chosen, self._batch_size = run, levels, chosen, batch_size
        self._recogniser = Recogniser(run.pipe)
        self._calls_before = 0
        self.probes: list[Probe] = []

    def on_step(self, step: SamplerStep) -> None:
        run = self._run
        calls = tuple(run.latest)
        made, self._calls_before = len(run.kinds) - self._calls_before, len(run.kinds)
        if made != len(calls):
            raise PlanError(
                f"the pipeline called the network {made} times for one step of the scheduler, "
                f"{run.denoiser.schedule.calls_per_step} were recorded; such a pipeline cannot be analysed"
            )
        first = calls[0].step
        if first not in self._chosen:
            return
        self.probes.append(
            Probe(
                calls=calls,
                sample=step.sample,
                guidance=self._recogniser.recognise(
                    calls, step.prediction, step.sample, self._levels.scaled(step.sample, first)
                ),
                levels=self._levels,
                denoiser=run.denoiser,
                batch_size=self._batch_size,
            )
        )
