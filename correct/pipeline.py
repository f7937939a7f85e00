"""A deployed pipeline whose sampling is corrected on the way."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from typing import Any

from errata.correct.batch_invariance import SampleWise, works_one_by_one
from errata.correct.conflicts import check_conflicts
from errata.correct.corrector import Corrector, CorrectorContext, Method
from errata.correct.diffier import DiffIER
from errata.correct.fresh_noise import FreshNoise
from errata.correct.guidance import asked_scale, scheduler_timesteps
from errata.correct.hindsight import check_order
from errata.correct.iec import IEC
from errata.correct.lookahead import check_effect
from errata.correct.noise_levels import NoiseLevels
from errata.correct.plans import Plan
from errata.correct.refresh import Refresh
from errata.correct.scheduler_hook import SchedulerHook, decide, run_stats
from errata.correct.stats import RunStats, overhead
from errata.correct.step_rule import is_linear, keeps_samples
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.runtime.denoiser import Denoiser
from errata.runtime.pipeline import SteppedPipeline
from errata.runtime.run import Run


def wrap(deployed: DeployedPipeline, plan: Plan, *, batch_invariant: bool = False) -> CorrectedPipeline:
    """A pipeline with the same call as `deployed`, corrected by `plan`; `deployed` itself stays as it is.

    Args:
        deployed: a loaded artifact.
        plan: what to do, and where.
        batch_invariant: evaluate the denoiser, text encoders and a VAE image by image. Given a generator for
            each, an image is then bit for bit the same alone and in a batch, at the cost of B small calls in
            place of a large one. Without it a sum in another order makes the last bits differ; no decision of
            a correction depends on other images either way, but for `IEC.official()`, which is refused here.
            AudioLDM 2 pads prompts to the longest of a batch, so there it holds for prompts of one length.

    Raises:
        TypeError: `deployed` is anything but a loaded artifact.
        PlanError: the plan selects nothing that this artifact has, was made for another artifact, names a
            method that cannot work on it, or methods in an order that makes no sense.
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

    A call samples on a private copy of the pipeline (a `Run`), with a tap on that copy's `scheduler.step`, so
    the pipeline keeps its loop, and nothing is patched on any object of the caller's. Several of them may
    sample on one artifact, in threads of their own too: their denoiser calls take turns.

    Attributes:
        deployed: the artifact.
        plan: what was asked for.
        steps: the steps that it comes to.
    """

    def __init__(self, deployed: DeployedPipeline, plan: Plan, *, batch_invariant: bool = False) -> None:
        self.deployed = deployed
        self.plan = plan
        _check_artifact(plan, deployed)
        self._placed = plan.placed(deployed.schedule)
        check_effect(self._placed, deployed.schedule)
        check_order(self._placed)
        _check_can_guide(self._placed, deployed.pipe)
        if batch_invariant:
            _check_batch_invariant(plan)
        self._levels: NoiseLevels | None = None
        self._checked_with: tuple[Any, Any] | None = None
        self._check_scheduler()
        self.steps = tuple(sorted({step for _, steps in self._placed for step in steps}))
        self._works_one_by_one = batch_invariant
        self._stats: RunStats | None = None

    @property
    def pipe(self) -> Any:
        """The diffusers pipeline that is corrected; calling it directly corrects nothing."""
        return self.deployed.pipe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; arguments and result are those of the deployed pipeline.

        A callback gets the private copy of the pipeline as its `pipe`.

        Raises:
            ArtifactMismatch: another `num_inference_steps` than recorded.
            PlanError: the pipeline does something between network and scheduler that cannot be reproduced; or
                its scheduler was replaced since by one that a method of the plan cannot work with.
            ErrataError: the denoiser returned NaN, at whatever step; a plan that corrects nothing does not
                look.
        """
        arguments = self.deployed.arguments(kwargs, args)
        self._check_scheduler()
        asked = asked_scale(self.deployed.pipe, arguments)
        _check_guidance(self._placed, asked)
        correctors = [method.corrector(self._setting(steps)) for method, steps in self._placed]
        run = self._start(correctors)
        if self._works_one_by_one:
            works_one_by_one(run.pipe)
        if not correctors:
            output = run.pipe(**arguments)
            self._stats = run_stats(run, {})
            return output
        tap = SchedulerHook(
            run,
            correctors,
            levels=self._levels,
            noise=FreshNoise(arguments.get("generator")),
            guidance_scale=asked,
        )
        with tap.installed():
            output = run.pipe(**arguments)
        self._stats = run_stats(run, tap.finish())
        _warn_of_divergence(self._stats)
        return output

    @property
    def _denoiser(self) -> Denoiser:
        denoiser = self.deployed.denoiser
        return SampleWise(denoiser) if self._works_one_by_one else denoiser

    @property
    def stats(self) -> RunStats:
        """What the latest finished call did.

        Raises:
            PlanError: there is none yet.
        """
        if self._stats is None:
            raise PlanError("nothing has been sampled yet; call the corrected pipeline, then read its stats")
        return self._stats

    def overhead(self) -> float:
        """Overhead of the latest finished call, by the measured cost of each kind of evaluation."""
        return overhead(self.stats, self._denoiser)

    def _check_scheduler(self) -> None:
        """Reads the noise levels, and asks each method, unless that was done for this scheduler as it is.

        A config of diffusers is frozen: one that changes is another object.
        """
        scheduler = self.deployed.pipe.scheduler
        config = scheduler.config
        if self._checked_with is not None:
            checked, checked_config = self._checked_with
            if scheduler is checked and config is checked_config:
                return
        self._levels = _levels_of(self.deployed)
        for method, steps in self._placed:
            method.check(self._setting(steps))
        check_conflicts(self._placed, is_linear=is_linear(scheduler))
        self._checked_with = scheduler, config

    def _setting(self, steps: tuple[int, ...]) -> CorrectorContext:
        denoiser = self.deployed.denoiser
        refreshing = [chosen for method, chosen in self._placed if isinstance(method, Refresh)]
        return CorrectorContext(
            steps=steps,
            schedule=denoiser.schedule,
            timesteps=denoiser.timesteps,
            levels=self._levels,
            refreshed=tuple(sorted({step for chosen in refreshing for step in chosen})),
            keeps_samples=keeps_samples(self.deployed.pipe.scheduler),
        )

    def _start(self, correctors: list[Corrector]) -> Run:
        if not correctors:
            return self.deployed.start(denoiser=self._denoiser)
        return self.deployed.start(
            denoiser=self._denoiser,
            decide=functools.partial(decide, correctors),
            remembers=max(corrector.remembers for corrector in correctors),
        )


def _levels_of(deployed: DeployedPipeline) -> NoiseLevels | None:
    """None where they are not known; a method that needs them says so in its `check`."""
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
            f"this plan was made for the artifact {plan.artifact[:12]}…, this one is "
            f"{digest[:12]}…; its steps and its expected quality belong to that one: make a plan for this "
            "one with errata.correct.plan(deployed, …)"
        )
    recorded, taken = deployed.manifest.sampler.num_inference_steps, deployed.num_inference_steps
    if taken != recorded:
        raise PlanError(
            f"this plan was made for {recorded} sampling steps, this pipeline takes {taken}: its steps and "
            "its expected quality do not hold here; sample with the recorded number, or write a plan that "
            "names no artifact"
        )


def _check_batch_invariant(plan: Plan) -> None:
    for method, _ in plan.parts:
        if isinstance(method, IEC) and method.stopping == "official":
            raise PlanError(
                'batch_invariant=True with IEC(stopping="official"), whose residual is that of the whole '
                'batch, so an image depends on its neighbours; choose "per_sample", or batches of 1'
            )


def _check_can_guide(placed: Sequence[tuple[Method, tuple[int, ...]]], pipe: Any) -> None:
    """Whether a call is guided shows when it is made; without a guidance scale none ever is."""
    names = [*inspect.signature(type(pipe).__call__).parameters, *dir(type(pipe))]
    can_guide = any("guidance" in name for name in names)
    if not can_guide and any(isinstance(method, DiffIER) for method, _ in placed):
        raise PlanError(
            f"DiffIER reduces the error of guided predictions, and {type(pipe).__name__} has no guidance "
            "scale; correct with IEC"
        )


def _check_guidance(placed: Sequence[tuple[Method, tuple[int, ...]]], asked: float | None) -> None:
    if asked is not None and asked <= 1 and any(isinstance(method, DiffIER) for method, _ in placed):
        raise PlanError(
            f"DiffIER reduces the error of guided predictions, and guidance_scale={asked:g} guides nothing; "
            "sample with one above 1, or correct with IEC"
        )


def _warn_of_divergence(stats: RunStats) -> None:
    if stats.diverged:
        # Without the number, so that the same place is warned once; it is in the stats.
        warnings.warn(
            "the residual of a correction grew beyond its first, and the better iterate was kept; a smaller "
            "step_size converges more surely, see stats.diverged and stats.steps[i].diverged",
            RuntimeWarning,
            stacklevel=3,
        )


def _not_deployed(given: object) -> str:
    name = type(given).__name__
    if isinstance(given, SteppedPipeline):
        return (
            f"wrap() takes a loaded artifact, not a {name}: freeze it first, "
            "deploy.load(deploy.export(compressed, out))"
        )
    if hasattr(given, "scheduler") and hasattr(given, "unet"):
        return (
            f"wrap() takes a loaded artifact, not a float {name}: compress it, export it and load it, "
            "deploy.load(deploy.export(compress.apply(pipe, …), out))"
        )
    return f"wrap() takes a loaded artifact, not a {name}: pass what deploy.load(path) returns"
