"""Probes along a run of an artifact: one for each step that was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errata.correct.analysis.probe import Probe
from errata.correct.analysis.watch import SamplerStep, watched
from errata.correct.guidance import Recogniser
from errata.correct.noise_levels import NoiseLevels
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.runtime.run import Run


def probes_of(
    deployed: DeployedPipeline, arguments: Mapping[str, Any], chosen: frozenset[int], *, batch_size: int
) -> list[Probe]:
    """Samples once with `arguments`, and keeps the steps whose (first) denoiser call is one of `chosen`.

    Raises:
        PlanError: the scheduler's noise levels are not known, or the pipeline does something between network
            and scheduler that is not understood.
        ArtifactMismatch: another number of steps than recorded.
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
    """Makes a probe of every chosen step of a run."""

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
