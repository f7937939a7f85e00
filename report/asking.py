"""What is asked of a report, looked through before anything is measured or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline

from errata.calibration import model_fingerprint
from errata.correct import Plan, steps, wrap
from errata.correct.sampling import Inputs
from errata.deploy import DeployedPipeline
from errata.errors import ReportError
from errata.quality.reference import Reference
from errata.report.grid import RowSpec, artifact_row, check_names, float_row
from errata.report.provenance import rank_notes
from errata.report.results import FLOAT


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The arguments of `errata.report.run` that decide what is measured."""

    artifacts: Mapping[str, DeployedPipeline]
    plans: Mapping[str, Plan]
    reference: Reference
    baseline: DiffusionPipeline | None
    fingerprint: str | None
    inputs: Inputs
    samples: int
    batch_size: int
    seed: int
    equal_compute: bool
    notes: tuple[str, ...]
    amplification: str | None = None

    @property
    def steps(self) -> int:
        """Sampling steps, the same for all artifacts."""
        return next(iter(self.artifacts.values())).num_inference_steps

    @property
    def device(self) -> torch.device:
        """What all run on."""
        device: torch.device = next(iter(self.artifacts.values())).pipe.device
        return device

    def rows(self) -> list[RowSpec]:
        """Those that were asked for, artifact by artifact, the float model's first."""
        rows = [] if self.fingerprint is None else [self.float_row(self.steps)]
        for name, deployed in self.artifacts.items():
            for plan_name, plan in self.plans.items():
                role = "uncorrected" if plan.corrects_nothing else "plan"
                rows.append(artifact_row(name, deployed, plan_name, plan, role=role))  # type: ignore[arg-type]
        return rows

    def float_row(self, steps: int) -> RowSpec:
        """A row of the float model."""
        assert self.fingerprint is not None  # else there is no such row
        return float_row(self.fingerprint, steps, device=self.device.type, recorded_steps=self.steps)


def ask(
    deployed: DeployedPipeline | Mapping[str, DeployedPipeline],
    plans: Mapping[str, Plan],
    reference: Reference,
    *,
    samples: int,
    batch_size: int,
    seed: int,
    baseline: DiffusionPipeline | None,
    inputs: Inputs,
    equal_compute: bool,
    amplification: str | None,
    shown: int,
    announce: Callable[[str], None],
) -> Asked:
    """Looks through the arguments of `errata.report.run`; `announce` hears what will weaken the result.

    Raises:
        ReportError: one does not fit.
        PlanError: an artifact cannot serve a plan.
    """
    artifacts = named(deployed)
    check_sizes(artifacts, samples=samples, batch_size=batch_size, shown=shown)
    plans = with_uncorrected(plans)
    check_names(plans)
    fingerprint = None if baseline is None else fingerprint_of(artifacts, baseline)
    for artifact in artifacts.values():
        for plan in plans.values():
            wrap(artifact, plan)  # refuses what cannot be served
        if amplification is not None:
            steps.select(amplification, artifact.schedule)  # refuses steps that are not there
    notes = rank_notes(samples, reference)
    for note in notes:
        announce(note)
    return Asked(
        artifacts=artifacts,
        plans=plans,
        reference=reference,
        baseline=baseline,
        fingerprint=fingerprint,
        inputs=inputs,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        equal_compute=equal_compute,
        notes=notes,
        amplification=amplification,
    )


def named(deployed: DeployedPipeline | Mapping[str, DeployedPipeline]) -> dict[str, DeployedPipeline]:
    """Artifacts by name; one alone is called like its recipe.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(deployed, DeployedPipeline):
        return {deployed.manifest.recipe.name: deployed}
    if not isinstance(deployed, Mapping):
        raise TypeError(
            f"report.run takes what deploy.load(path) returns, or a mapping of names to that; got a "
            f"{type(deployed).__name__}"
        )
    return dict(deployed)


def with_uncorrected(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """The plans, the one that corrects nothing first; it is added if it is not there.

    Raises:
        ReportError: several plans that correct nothing, or one that corrects is called "none".
    """
    plain = {name: plan for name, plan in plans.items() if plan.corrects_nothing}
    if len(plain) > 1:
        raise ReportError(f"plans {sorted(plain)} all correct nothing; keep one")
    if not plain and "none" in plans:
        steps = " + ".join(steps for _, steps in plans["none"].parts)
        raise ReportError(f'plan "none" corrects steps {steps!r}; give it another name')
    return {**(plain or {"none": Plan.none()}), **plans}


def check_sizes(
    artifacts: Mapping[str, DeployedPipeline], *, samples: int, batch_size: int, shown: int
) -> None:
    """Refuse numbers and artifacts that make no report.

    Raises:
        ReportError: naming what is wrong.
    """
    for name, value, least in (("samples", samples, 2), ("batch_size", batch_size, 1), ("shown", shown, 0)):
        if value < least:
            raise ReportError(f"{name}={value}; it must be at least {least}")
    if not artifacts:
        raise ReportError("there is no artifact to report on; pass at least one")
    if FLOAT in artifacts:
        raise ReportError(f"an artifact is called {FLOAT!r}, which names the float model's row; rename it")
    steps = {name: artifact.num_inference_steps for name, artifact in artifacts.items()}
    if len(set(steps.values())) > 1:
        raise ReportError(
            f"the artifacts have different numbers of steps, {steps}; report on them one by one"
        )


def fingerprint_of(artifacts: Mapping[str, DeployedPipeline], baseline: DiffusionPipeline) -> str:
    """That of a float model's weights.

    Raises:
        ReportError: an artifact was made from others.
    """
    found: str = model_fingerprint(baseline.unet)
    for name, artifact in artifacts.items():
        expected = artifact.manifest.calibration["fingerprint"]
        if found != expected:
            raise ReportError(
                f"artifact {name!r} was made from another model than the baseline (fingerprint "
                f"{expected[:12]}…, the baseline has {found[:12]}…); pass the pipeline that was compressed, "
                "or leave the baseline out"
            )
    return found
