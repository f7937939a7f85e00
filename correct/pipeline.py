"""A deployed pipeline whose sampling is corrected on the way."""

from __future__ import annotations

from typing import Any

from errata.compress.network.pipeline import SteppedPipeline
from errata.correct.plan import Plan
from errata.correct.stats import RunStats, overhead
from errata.correct.tap import Tap, run_stats
from errata.deploy import DeployedPipeline
from errata.errors import PlanError


def wrap(deployed: DeployedPipeline, plan: Plan) -> CorrectedPipeline:
    """A pipeline with the same call as `deployed`, corrected by `plan`; `deployed` itself stays as it is.

    Raises:
        TypeError: `deployed` is anything but a loaded artifact.
        PlanError: the plan selects nothing that this artifact has.
    """
    if not isinstance(deployed, DeployedPipeline):
        raise TypeError(_not_deployed(deployed))
    if not isinstance(plan, Plan):
        raise TypeError(
            f"the plan is a {type(plan).__name__}; pass a Plan, such as Plan(IEC(), steps='ends:1/10')"
        )
    return CorrectedPipeline(deployed, plan)


class CorrectedPipeline:
    """Made by `wrap`.

    A call samples on a private copy of the pipeline (a `Run`), with a tap on that copy's `scheduler.step`, so
    the pipeline keeps its loop, and nothing is patched on any object of the caller's.

    Attributes:
        deployed: the artifact.
        plan: what was asked for.
        steps: the steps that it comes to.
    """

    def __init__(self, deployed: DeployedPipeline, plan: Plan) -> None:
        self.deployed = deployed
        self.plan = plan
        self.steps = plan.resolve(deployed.schedule)
        self._stats: RunStats | None = None

    def __call__(self, **kwargs: Any) -> Any:
        """Sample; keyword arguments and result are those of the deployed pipeline.

        Raises:
            ArtifactMismatch: another `num_inference_steps` than recorded.
            PlanError: the pipeline does something between network and scheduler that cannot be reproduced.
            ErrataError: the denoiser returned NaN at a corrected step.
        """
        arguments = self.deployed.arguments(kwargs)
        run = self.deployed.start()
        if self.plan.method is None or not self.steps:
            output = run.pipe(**arguments)
            self._stats = run_stats(run, {})
            return output
        tap = Tap(run, self.plan.method.corrector(), self.steps)
        with tap.installed():
            output = run.pipe(**arguments)
        self._stats = run_stats(run, tap.finish())
        return output

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
        return overhead(self.stats, self.deployed.denoiser)


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
