"""A deployed pipeline whose sampling is corrected on the way."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

from errata.correct.batch_invariance import BatchInvariantDenoiser, FreshNoise, run_row_by_row
from errata.correct.corrector import Corrector, CorrectorContext, Method
from errata.correct.guidance import asked_scale
from errata.correct.latent_upscaler import scheduler_timesteps
from errata.correct.noise_levels import NoiseLevels
from errata.correct.plan_check import Placed, check_call, check_plan, check_scheduler
from errata.correct.plans import Plan
from errata.correct.scheduler_hook import SchedulerHook, decide
from errata.correct.stats import RunStats, overhead, run_stats
from errata.correct.step_rule import is_linear, keeps_samples
from errata.correct.traits import acts_between, traits_of
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.runtime.denoiser import Denoiser
from errata.runtime.pipeline import SteppedPipeline
from errata.runtime.run import Run


def wrap(deployed: DeployedPipeline, plan: Plan, *, batch_invariant: bool = False) -> CorrectedPipeline:
    """Return a pipeline with the call of `deployed`, corrected by `plan`; `deployed` stays as it is.

    Args:
        deployed: a loaded artifact.
        plan: what to do, and where.
        batch_invariant: run the denoiser, text encoders and VAE image by image. Given a generator for each
            image, an image is then bit for bit the same alone and in a batch, at the cost of B small calls
            instead of a large one. Without it the last bits may differ, because sums run in another order.
            Corrections decide image by image either way, except for `IEC.official()`, which is refused here.
            AudioLDM 2 pads prompts to the longest of a batch, so there it holds for prompts of one length.

    Raises:
        TypeError: `deployed` is anything but a loaded artifact.
        PlanError: the plan selects no step of this artifact, was made for another artifact, or has a method
            that cannot work on it or after the ones before it.
    """
    if not isinstance(deployed, DeployedPipeline):
        raise TypeError(_not_deployed(deployed))
    if not isinstance(plan, Plan):
        raise TypeError(
            f"the plan is a {type(plan).__name__}; pass a Plan, such as Plan(IEC(), steps='ends:1/10')"
        )
    return CorrectedPipeline(deployed, plan, batch_invariant=batch_invariant)


class CorrectedPipeline:
    """Made by `wrap`.

    A call samples on a private copy of the pipeline (a `Run`), with a hook on that copy's `scheduler.step`.
    So the pipeline keeps its loop, and no object of the caller is patched. Several corrected pipelines may
    sample on one artifact, also in different threads: their denoiser calls take turns.

    Attributes:
        deployed: the artifact.
        plan: as given.
        steps: the steps that the plan selects on this artifact.
    """

    def __init__(self, deployed: DeployedPipeline, plan: Plan, *, batch_invariant: bool = False) -> None:
        self.deployed = deployed
        self.plan = plan
        _check_artifact(plan, deployed)
        self._placed = plan.placed(deployed.schedule)
        check_plan(self._placed, deployed.schedule, deployed.pipe, batch_invariant=batch_invariant)
        self._levels: NoiseLevels | None = None
        self._checked_with: tuple[Any, Any] | None = None
        self._check_scheduler()
        self._network_corrections = self._corrections_of_network()
        self.steps = tuple(sorted({step for _, steps in self._placed for step in steps}))
        self._is_batch_invariant = batch_invariant
        self._stats: RunStats | None = None

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline that is corrected; calling it directly corrects nothing."""
        return self.deployed.pipe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; arguments and result are those of the deployed pipeline.

        A callback gets the private copy of the pipeline as its `pipe`.

        Raises:
            ArtifactMismatchError: `num_inference_steps` is not the recorded number.
            PlanError: the pipeline does something between network and scheduler that cannot be reproduced; or
                its scheduler was replaced by one that a method of the plan cannot work with.
            ErrataError: the denoiser returned NaN at any step. A plan that corrects nothing does not check.
        """
        arguments = self.deployed.arguments(kwargs, args)
        self._check_scheduler()
        asked = asked_scale(self.deployed.pipe, arguments)
        check_call(self._placed, asked)
        acting = [
            (method, method.corrector(self._context(steps)))
            for method, steps in self._placed
            if acts_between(method)
        ]
        run = self._start(acting)
        if self._is_batch_invariant:
            run_row_by_row(run.pipe)
        if not acting:
            output = run.pipe(**arguments)
            self._stats = run_stats(run, {})
            return output
        hook = SchedulerHook(
            run,
            acting,
            levels=self._levels,
            noise=FreshNoise(arguments.get("generator")),
            guidance_scale=asked,
        )
        with hook.installed():
            output = run.pipe(**arguments)
        self._stats = run_stats(run, hook.finish())
        _warn_of_divergence(self._stats)
        return output

    @property
    def _denoiser(self) -> Denoiser:
        denoiser = self.deployed.denoiser
        for correct in self._network_corrections:
            denoiser = correct(denoiser)
        return BatchInvariantDenoiser(denoiser) if self._is_batch_invariant else denoiser

    @property
    def levels(self) -> NoiseLevels | None:
        """Noise levels of the artifact's calls; None if they are not known for its scheduler."""
        return self._levels

    @property
    def placed(self) -> Placed:
        """The methods of the plan, in order, each with the calls at which it acts."""
        return self._placed

    @property
    def stats(self) -> RunStats:
        """What the latest finished call did.

        Raises:
            PlanError: there is none yet.
        """
        if self._stats is None:
            raise PlanError("nothing was sampled yet; call the corrected pipeline before you read its stats")
        return self._stats

    def overhead(self) -> float:
        """Return the overhead of the latest finished call, by the measured costs of evaluations."""
        return overhead(self.stats, self._denoiser)

    def _check_scheduler(self) -> None:
        """Read the noise levels and check the plan, unless that was done for this scheduler as it is.

        A config of diffusers is frozen: a changed one is another object.
        """
        scheduler = self.deployed.pipe.scheduler
        config = scheduler.config
        if self._checked_with is not None:
            checked, checked_config = self._checked_with
            if scheduler is checked and config is checked_config:
                return
        self._levels = _levels_of(self.deployed)
        contexts = [(method, self._context(steps)) for method, steps in self._placed]
        check_scheduler(contexts, is_linear=is_linear(scheduler))
        self._checked_with = scheduler, config

    def _corrections_of_network(self) -> list[Callable[[Denoiser], Denoiser]]:
        correcting: list[tuple[Any, tuple[int, ...]]] = [
            (method, steps) for method, steps in self._placed if traits_of(method).corrects_network
        ]
        return [method.network_correction(self, steps) for method, steps in correcting]

    def _context(self, steps: tuple[int, ...]) -> CorrectorContext:
        denoiser = self.deployed.denoiser
        refreshing = [chosen for method, chosen in self._placed if traits_of(method).refreshes]
        return CorrectorContext(
            steps=steps,
            schedule=denoiser.schedule,
            timesteps=denoiser.timesteps,
            levels=self._levels,
            refreshed=tuple(sorted({step for chosen in refreshing for step in chosen})),
            keeps_samples=keeps_samples(self.deployed.pipe.scheduler),
        )

    def _start(self, acting: list[tuple[Method, Corrector]]) -> Run:
        if not acting:
            return self.deployed.start(denoiser=self._denoiser)
        return self.deployed.start(
            denoiser=self._denoiser,
            decide=functools.partial(decide, acting),
            remembers=max(corrector.remembers for _, corrector in acting),
        )


def _levels_of(deployed: DeployedPipeline) -> NoiseLevels | None:
    """Return the noise levels, or None where they are not known; `plan_check` asks who needs them."""
    pipe, count = deployed.pipe, deployed.num_inference_steps
    timesteps = scheduler_timesteps(pipe, deployed.denoiser.timesteps, num_inference_steps=count)
    try:
        return NoiseLevels.of(pipe.scheduler, timesteps, num_inference_steps=count)
    except PlanError:
        return None


def _check_artifact(plan: Plan, deployed: DeployedPipeline) -> None:
    if plan.artifact is None:
        return
    digest = deployed.manifest.sha256
    if plan.artifact != digest:
        raise PlanError(
            f"this plan was made for the artifact {plan.artifact[:12]}…, but this is {digest[:12]}…: its "
            "steps and its expected quality do not hold here; make a plan for this one with `errata plan` "
            "or errata.correct.plan(deployed, …)"
        )
    recorded, taken = deployed.manifest.sampler.num_inference_steps, deployed.num_inference_steps
    if taken != recorded:
        raise PlanError(
            f"this plan was made for {recorded} sampling steps, but this pipeline takes {taken}: its steps "
            "and its expected quality do not hold here; sample with the recorded number, or use a plan that "
            "is not bound to an artifact"
        )


def _warn_of_divergence(stats: RunStats) -> None:
    if stats.diverged:
        # Without the number, so that Python shows it once a place; the number is in the stats.
        warnings.warn(
            "the residual of a correction grew beyond its first value, so the better iterate was kept; try a "
            "smaller step_size; see stats.diverged and stats.steps[i].diverged",
            RuntimeWarning,
            stacklevel=3,
        )


def _not_deployed(given: object) -> str:
    name = type(given).__name__
    if isinstance(given, SteppedPipeline):
        return (
            f"wrap() takes a loaded artifact, not a {name}: freeze it first, "
            "deploy.load(deploy.deploy(compressed, out))"
        )
    if hasattr(given, "scheduler") and hasattr(given, "unet"):
        return (
            f"wrap() takes a loaded artifact, not a float {name}: compress it, export it and load it, "
            "deploy.load(deploy.deploy(compress.compress(pipe, …), out))"
        )
    return f"wrap() takes a loaded artifact, not a {name}: pass what deploy.load(path) returns"
