"""Plan files for `errata inspect` and `errata verify`: what a plan does, and whether an artifact takes it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from errata.errors import PlanError

if TYPE_CHECKING:
    from errata.correct import Method, Plan

_STEPS_IN_WORDS = {"all": "all steps that it can correct", "full": "full steps", "none": "no step"}


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
