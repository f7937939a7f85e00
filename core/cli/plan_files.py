"""Plan files: the one that `--correct auto` keeps beside an artifact, and any one told in words."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.plans import AUTO, check_options_belong, plan_text
from errata.cli.usage import UsageError
from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.correct import Method, Plan
    from errata.deploy import DeployedPipeline

_STEPS_IN_WORDS = {"all": "all steps that it can correct", "full": "full steps", "none": "no step"}


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
    deployed: DeployedPipeline,
    inputs: Callable[[range], Mapping[str, Any]],
    *,
    sheet: Path | None = None,
) -> Plan:
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


def chosen_text(plan: Plan, sheet: Path | None) -> str:
    """Return what `auto_plan` chose, for people; it says so where the given sheet is not a part of it."""
    from errata.correct import Sheet

    is_used = any(isinstance(method, Sheet) for method, _ in plan.parts)
    reason = "the plan that it was fitted under does worse here, or it was fitted to other steps"
    return plan_text(plan) + ("" if sheet is None or is_used else f"; {sheet} is left out, because {reason}")


def is_plan_file(path: Path) -> bool:
    """Return whether a file is JSON, as plans are and sheets are not.

    Raises:
        PlanError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip().startswith(b"{")
    except OSError as problem:
        raise PlanError(
            f"cannot read `{path}`: {problem.strerror}; give a plan, a sheet or an artifact"
        ) from problem


def plan_words(plan: Plan) -> str:
    """Return what a plan does, for whom it was made, and what it was measured to do, a line each."""
    artifact = "any artifact" if plan.artifact is None else f"the artifact {_shortened(plan.artifact)}"
    lines = [f"plan for {artifact}"]
    parts = [(method, steps) for method, steps in plan.parts if method is not None and steps != "none"]
    if not parts:
        lines.append("it corrects nothing")
    lines += [f"{number}. {_part(*part)}" for number, part in enumerate(parts, start=1)]
    if plan.expected is not None:
        lines.append(f"measured: {plan.expected.summary()}")
    return "\n".join(lines)


def check_attaches(plan: Plan, artifact: Path) -> None:
    """Load an artifact, and check that the plan can be used on it.

    Raises:
        ArtifactError: the artifact cannot be loaded.
        PlanError: the plan was made for another one, or corrects steps or uses methods that it cannot serve.
    """
    from errata import correct, deploy

    correct.wrap(deploy.load(artifact), plan)


def _part(method: Method, steps: str) -> str:
    from errata.correct import Sheet

    if isinstance(method, Sheet):
        return method.summary_text().replace("\n", "; ")
    where = _STEPS_IN_WORDS.get(steps, f"steps {' '.join(steps.split())}")
    told = (inspect.getdoc(type(method)) or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")
    return f"{method}, at {where}" + (f": {told}" if told else "")


def _shortened(digest: str) -> str:
    return f"{digest[:12]}…" if digest.isalnum() else repr(digest[:64])
