"""The rows of a report: what each one runs, and the name of its measurements."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata import canonical_json
from errata.correct import Plan
from errata.deploy import DeployedPipeline
from errata.errors import ReportError
from errata.report.provenance import kernels_of
from errata.report.results import FLOAT, Role

Key = tuple[str, str]
"""Names of artifact and plan."""

FLOAT_KEY: Key = (FLOAT, "none")
# Hexadecimal digits of a digest that name a row's measurements; 2^80 rows before two are likely to collide.
_DIGITS = 40


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """One row before it is measured.

    Attributes:
        artifact: its name; `FLOAT` for the float model.
        plan_name: what the row is called.
        role: why it is there.
        plan: what corrects it; None for the float model.
        steps: sampling steps.
        directory: of its measurements.
        stands_for: what the row is, in words, where the report itself added it.
    """

    artifact: str
    plan_name: str
    role: Role
    plan: Plan | None
    steps: int
    directory: str
    stands_for: str = ""

    @property
    def key(self) -> Key:
        """Names of artifact and plan."""
        return self.artifact, self.plan_name

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value."""
        return {
            "artifact": self.artifact,
            "plan_name": self.plan_name,
            "role": self.role,
            "plan": None if self.plan is None else self.plan.to_json(),
            "steps": self.steps,
            "directory": self.directory,
            "stands_for": self.stands_for,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RowSpec:
        """Inverse of `to_json`."""
        plan = value["plan"]
        return cls(**{**value, "plan": None if plan is None else Plan.from_json(plan)})


def artifact_row(
    name: str,
    deployed: DeployedPipeline,
    plan_name: str,
    plan: Plan,
    *,
    role: Role,
    steps: int | None = None,
    stands_for: str = "",
) -> RowSpec:
    """A row of an artifact, at the recorded number of steps unless `steps` says another."""
    taken = deployed.num_inference_steps if steps is None else steps
    decides = {
        "artifact": deployed.manifest.sha256,
        "device": deployed.pipe.device.type,
        "kernels": kernels_of(deployed),
        # By the steps that it comes to: however they are spelled, they are measured once.
        "plan": [[method.to_json(), list(placed)] for method, placed in plan.placed(deployed.schedule)],
        "steps": taken,
    }
    return RowSpec(
        artifact=name,
        plan_name=plan_name,
        role=role,
        plan=plan,
        steps=taken,
        directory=_directory(decides),
        stands_for=stands_for,
    )


def float_row(fingerprint: str, steps: int, *, device: str, recorded_steps: int) -> RowSpec:
    """A row of the float model: at the recorded number of steps to compare with, at others a rival."""
    is_rival = steps != recorded_steps
    return RowSpec(
        artifact=FLOAT,
        plan_name=f"{steps} steps" if is_rival else "none",
        role="equal compute" if is_rival else "float",
        plan=None,
        steps=steps,
        directory=_directory({"float": fingerprint, "steps": steps, "device": device}),
        stands_for=f"the float model with {steps} steps" if is_rival else "",
    )


def repeats(rows: Sequence[RowSpec]) -> dict[Key, str]:
    """For each row that corrects the same steps by the same methods as an earlier one, that one's plan."""
    first: dict[Key, str] = {}  # artifact and directory, to plan
    repeated: dict[Key, str] = {}
    for row in rows:
        name = first.setdefault((row.artifact, row.directory), row.plan_name)
        if name != row.plan_name:
            repeated[row.key] = name
    return repeated


def check_names(plans: Mapping[str, Plan]) -> None:
    """Refuse names that the report gives to rows of its own.

    Raises:
        ReportError: a plan is called like one.
    """
    for name in plans:
        if re.fullmatch(r"\d+ steps|\+\d+ full|second-order at .*", name):
            raise ReportError(f"plan {name!r} is called like a row that the report adds; rename it")


def _directory(decides: Mapping[str, Any]) -> str:
    return canonical_json.digest(decides)[:_DIGITS]
