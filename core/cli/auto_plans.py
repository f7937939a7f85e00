"""`--correct auto`: the best plan that costs nothing, kept in a file beside the artifact."""

import argparse
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.plans import AUTO, check_options_belong, plan_text
from errata.cli.usage import UsageError
from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.correct import Plan
    from errata.deploy import DeployedPipeline


def is_auto(args: argparse.Namespace) -> bool:
    """Return whether the plan is to be chosen for the artifact.

    Raises:
        UsageError: with options that belong to other plans.
    """
    if args.correct != (AUTO,) or args.plan is not None:
        return False
    check_options_belong(args, ())
    if args.at is not None:
        raise UsageError("--at has no effect with `--correct auto`, which chooses steps itself; leave it out")
    return True


def auto_plan(
    artifact: Path,
    deployed: "DeployedPipeline",
    inputs: "Callable[[range], Mapping[str, Any]]",
    *,
    sheet: Path | None = None,
) -> "Plan":
    """Return the best plan that costs nothing; without a sheet it is kept in a file beside the artifact.

    A file of another artifact, or one that cannot be read, is replaced. For another number of sampling steps
    than the recorded one the plan is chosen anew, and not kept.
    """
    from errata.correct import Plan, Sheet

    if sheet is not None:
        return Plan.auto(deployed, inputs=inputs, sheets=[Sheet.load(sheet)])
    if deployed.num_inference_steps != deployed.manifest.sampler.num_inference_steps:
        return Plan.auto(deployed, inputs=inputs)
    kept = artifact.with_name(f"{artifact.resolve().name}.auto.json")
    with suppress(PlanError):
        plan = Plan.load(kept)
        if plan.artifact == deployed.manifest.sha256:
            return plan
    plan = Plan.auto(deployed, inputs=inputs)
    with suppress(PlanError):  # the folder may be read-only; then it is chosen anew the next time
        plan.save(kept)
    return plan


def chosen_text(plan: "Plan", sheet: Path | None) -> str:
    """Return what `auto_plan` chose, for people; it says so where the given sheet is not a part of it."""
    from errata.correct import Sheet

    is_used = any(isinstance(method, Sheet) for method, _ in plan.parts)
    reason = "the plan that it was fitted under does worse here, or it was fitted to other steps"
    return plan_text(plan) + ("" if sheet is None or is_used else f"; {sheet} is left out, because {reason}")
