"""What is asked of a report, validated before anything is measured or written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.calibration import model_fingerprint
from errata.correct import Plan, steps, wrap
from errata.correct.sampling import Inputs, default_inputs
from errata.deploy import DeployedPipeline
from errata.errors import ReportError
from errata.quality.metric import Metric, known_metrics
from errata.quality.reference import Reference
from errata.report.protocol import rank_notes
from errata.report.report_index import RowSpec, artifact_row, check_names, float_row
from errata.report.results import FLOAT
from errata.report_options import ReportOptions

Paired = Callable[[Tensor, Tensor], Tensor]
"""Takes images `(B, C, H, W)` in [0, 1] and others of the same shape, returns `(B,)`."""

Prompted = Callable[[Tensor, Sequence[str]], Tensor]
"""Takes images `(B, C, H, W)` in [0, 1] and B prompts, returns `(B,)`."""


PlanOrPlans = Plan | Mapping[str, Plan]
"""A plan for all artifacts of a report, or plans by name of the artifact."""


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Models of the metrics that need one.

    Attributes:
        lpips: a learned distance, such as `errata.quality.Lpips()`; None leaves it out.
        clip: a score of image and prompt, such as `errata.quality.ClipScore(…)`; None leaves it out.
    """

    lpips: Paired | None = None
    clip: Prompted | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that have a model here."""
        models = {"lpips": self.lpips, "clip_score": self.clip}
        return tuple(
            replace(metric, compute=model, model=str(getattr(model, "name", type(model).__name__)))
            for metric in known_metrics()
            if (model := models.get(metric.name)) is not None
        )


def chosen_metrics(scorer: Scorer | None, own: Sequence[Metric] = ()) -> tuple[Metric, ...]:
    """Return what a report measures: standard metrics, those with a model in `scorer`, and the user's.

    Raises:
        ReportError: two metrics have the same name, or one of the user's own computes nothing.
    """
    standard = [metric for metric in known_metrics() if metric.compute is not None]
    chosen = {metric.name: metric for metric in (*standard, *(scorer or Scorer()).metrics)}
    for metric in own:
        if metric.name in chosen:
            raise ReportError(f"there are two metrics called {metric.name!r}; rename yours")
        if metric.compute is None:
            raise ReportError(f"metric {metric.name!r} has no `compute`; give it a function")
        chosen[metric.name] = metric
    return tuple(chosen.values())


@dataclass(frozen=True, kw_only=True)
class ReportRequest(ReportOptions):
    """Everything that `errata.report.run` and `measure` are asked to do.

    Attributes:
        artifacts: by name, all with the same number of steps; one alone is named by its recipe.
        plans: by name; one that corrects nothing is added if there is none. In place of a plan there may be a
            mapping from names of artifacts to plans. A plan that is bound to one artifact, as by a sheet,
            gets a row of that artifact alone.
        reference: what images are compared with, and in which features.
        baseline: the float pipeline that the artifacts were made from, with the recorded scheduler. It adds
            its own row, comparisons of single images, and how errors grow along a run. Without it, images are
            compared with those of the same artifact, uncorrected.
        inputs: the pipelines' keyword arguments for a batch of sample indices.
        scorer: models of LPIPS and the CLIP score.
        metrics: metrics of your own, see `docs/extend-metric.md`.

    Raises:
        ReportError: a value does not fit.
        PlanError: an artifact cannot serve a plan.
        TypeError: `artifacts` is something else.
    """

    artifacts: Mapping[str, DeployedPipeline] = field()
    plans: Mapping[str, PlanOrPlans] = field()
    reference: Reference = field()
    baseline: DiffusionPipeline | None = None
    inputs: Inputs = default_inputs
    scorer: Scorer | None = None
    metrics: Sequence[Metric] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "artifacts", named(self.artifacts))
        check_artifacts(self.artifacts)
        object.__setattr__(self, "plans", with_uncorrected(self.plans))
        check_names(self.plans)
        _ = self.fingerprint, self.chosen_metrics  # raise where they do not fit
        self._check_plans()
        for artifact in self.artifacts.values():
            if self.amplification is not None:
                steps.select(self.amplification, artifact.schedule)  # raises if there are no such steps

    def _check_plans(self) -> None:
        """Check that each plan has an artifact, and that each artifact can serve its plans."""
        for name, plan in self.plans.items():
            known = set(self.artifacts) if isinstance(plan, Plan) else set(plan)
            if unknown := sorted(known - set(self.artifacts)):
                raise ReportError(
                    f"plan {name!r} is for the artifact {unknown[0]!r}, and the report has "
                    f"{', '.join(self.artifacts)}; use these names"
                )
            served = [artifact for artifact in self.artifacts if name in self.plans_of(artifact)]
            for artifact in served or self.artifacts:
                wrap(self.artifacts[artifact], plan if isinstance(plan, Plan) else plan[artifact])

    def plans_of(self, artifact: str) -> dict[str, Plan]:
        """Return the plans of an artifact by name, without those that are bound to another one."""
        plans = {
            name: plan if isinstance(plan, Plan) else plan.get(artifact) for name, plan in self.plans.items()
        }
        deployed = self.artifacts[artifact]
        return {name: plan for name, plan in plans.items() if plan is not None and plan.suits(deployed)}

    @cached_property
    def chosen_metrics(self) -> tuple[Metric, ...]:
        """All metrics to measure."""
        return chosen_metrics(self.scorer, self.metrics)

    @property
    def image_metrics(self) -> tuple[Metric, ...]:
        """Those that are measured on every image."""
        return tuple(metric for metric in self.chosen_metrics if metric.is_per_image)

    @cached_property
    def fingerprint(self) -> str | None:
        """Fingerprint of the float model's weights; None without one."""
        return None if self.baseline is None else fingerprint_of(self.artifacts, self.baseline)

    @property
    def steps(self) -> int:
        """Sampling steps, the same for all artifacts."""
        return next(iter(self.artifacts.values())).num_inference_steps

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        device: torch.device = next(iter(self.artifacts.values())).pipe.device
        return device

    @property
    def notes(self) -> tuple[str, ...]:
        """What weakens the result."""
        return rank_notes(self.samples, self.reference)

    def rows(self) -> list[RowSpec]:
        """Return the rows that were asked for, artifact by artifact, the float model's first."""
        rows = [] if self.fingerprint is None else [self.float_row(self.steps)]
        for name, deployed in self.artifacts.items():
            for plan_name, plan in self.plans_of(name).items():
                role = "uncorrected" if plan.corrects_nothing else "plan"
                rows.append(artifact_row(name, deployed, plan_name, plan, role=role))  # type: ignore[arg-type]
        return rows

    def float_row(self, steps: int) -> RowSpec:
        """Return a row of the float model."""
        assert self.fingerprint is not None  # else there is no such row
        return float_row(self.fingerprint, steps, device=self.device.type, recorded_steps=self.steps)


def named(deployed: object) -> dict[str, DeployedPipeline]:
    """Return artifacts by name; one alone is named by its recipe.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(deployed, DeployedPipeline):
        return {deployed.manifest.recipe.name: deployed}
    if not isinstance(deployed, Mapping):
        raise TypeError(
            "a report takes what deploy.load(path) returns, or a mapping of names to that; got a "
            f"{type(deployed).__name__}"
        )
    return dict(deployed)


def with_uncorrected(plans: Mapping[str, PlanOrPlans]) -> dict[str, PlanOrPlans]:
    """Return the plans, the one that corrects nothing first; it is added if there is none.

    Raises:
        ReportError: several plans correct nothing, or one that corrects is called "none".
    """
    plain = {name: plan for name, plan in plans.items() if isinstance(plan, Plan) and plan.corrects_nothing}
    if len(plain) > 1:
        raise ReportError(f"plans {sorted(plain)} all correct nothing; keep one")
    if not plain and "none" in plans:
        named = plans["none"]
        steps = " + ".join(steps for _, steps in named.parts) if isinstance(named, Plan) else "of its own"
        raise ReportError(f'plan "none" corrects steps {steps!r}; give it another name')
    return {**(plain or {"none": Plan.none()}), **plans}


def check_artifacts(artifacts: Mapping[str, DeployedPipeline]) -> None:
    """Check that the artifacts can share a report.

    Raises:
        ReportError: there is none, one has a reserved name, or their numbers of steps differ.
    """
    if not artifacts:
        raise ReportError("there is no artifact to report on; pass at least one")
    if FLOAT in artifacts:
        raise ReportError(f"an artifact is called {FLOAT!r}, which names the float model's row; rename it")
    steps = {name: artifact.num_inference_steps for name, artifact in artifacts.items()}
    if len(set(steps.values())) > 1:
        raise ReportError(
            f"the artifacts have different numbers of steps, {steps}; make one report for each number"
        )


def fingerprint_of(artifacts: Mapping[str, DeployedPipeline], baseline: DiffusionPipeline) -> str:
    """Return the fingerprint of a float model's weights.

    Raises:
        ReportError: an artifact was made from another model.
    """
    found: str = model_fingerprint(baseline.unet)
    for name, artifact in artifacts.items():
        expected = artifact.manifest.calibration["fingerprint"]
        if found != expected:
            raise ReportError(
                f"artifact {name!r} was made from another model than the baseline (fingerprint "
                f"{expected[:12]}…, the baseline has {found[:12]}…); use the pipeline that "
                "was compressed, or leave out the baseline"
            )
    return found


def batch_names(inputs: Inputs, batches: Sequence[range]) -> tuple[str, ...]:
    """Return a name for each batch: its number, and a digest of its size and the pipelines' arguments.

    Raises:
        ReportError: an argument's content cannot be read.
    """
    names = []
    for number, batch in enumerate(batches):
        digest = hashlib.sha256(f"{len(batch)}\n".encode())
        for name, value in sorted(inputs(batch).items()):
            digest.update(f"{name}\n".encode())
            _add(digest, name, value)
        names.append(f"{number:06d}-{digest.hexdigest()[:16]}")
    return tuple(names)


def statistics_digest(reference: Reference) -> str:
    """Return the SHA-256 of a reference's mean and covariance."""
    digest = hashlib.sha256()
    for tensor in (reference.statistics.mean, reference.statistics.covariance):
        _add(digest, "statistics", tensor)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest.update(f"{tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):  # a picture, or a numpy array
        digest.update(value.tobytes())
    elif isinstance(value, list | tuple) and not _is_plain(value):
        for item in value:
            _add(digest, name, item)
    elif _is_plain(value):
        digest.update(json.dumps(value).encode() + b"\n")
    else:
        raise ReportError(
            f"the pipelines' argument {name!r} is a {type(value).__name__}, which cannot be compared with "
            "that of an earlier run; pass text, numbers, pictures or tensors"
        )


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
