"""One row of a table of the paper: all settings that decide what is measured, checked when it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from errata import correct
from errata.compress import Recipe
from errata.correct import Plan
from errata.errors import ReportError

METRICS = ("fid", "is", "clip", "overhead")
METHODS = {"iec": correct.IEC}
PIPELINE_CLASSES = ("DDIMPipeline", "ClassConditionalLDMPipeline", "StableDiffusionPipeline")
_CALIBRATION = {"samples", "batch_size", "seed"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, with everything that decides what is measured.

    Attributes:
        name: unique within its table, such as `cifar10-w8a8-iec`.
        table: number in the paper.
        row: its name as printed.
        model, dataset, image_size: what the paper says of them.
        recipe: name of a `compress.Recipe`; None is the float model.
        plan: `{method, steps}` and fields of the method; None corrects nothing.
        published: printed numbers by metric, as text; None where the table prints nothing.
        pipeline: hub name or directory.
        pipeline_class: pipeline that samples with its networks.
        scheduler: `class` in diffusers, and settings that replace those of the pipeline.
        steps, eta, guidance_scale: of the sampler; None is no guidance.
        labels: "even", for a model that takes class labels.
        prompts: file of captions, one a line, for a model that takes text.
        clip: CLIP of the CLIP score, hub name or directory; None leaves the score out.
        calibration: samples, batch_size, seed.
        samples, batch_size, seed: for the images that are measured.
        reference: real images or their statistics, as `errata.quality.Reference.open` takes them.
        feature_network: as `errata.quality.open_network` takes it.
        metrics: columns of the table in the paper.
        unsupported: what the toolkit cannot do, with the reason.
        differences: from the paper's protocol, or what the paper does not say.
        ambiguous: what the printed table does not make clear.

    Raises:
        ReportError: a setting out of range, or settings that contradict each other.
        RecipeError: as `compression`.
        PlanError: as `correction`.
    """

    name: str
    table: int
    row: str
    model: str
    dataset: str
    image_size: int
    recipe: str | None
    plan: Mapping[str, Any] | None
    published: Mapping[str, str | None]
    pipeline: str
    pipeline_class: str
    scheduler: Mapping[str, Any]
    steps: int
    eta: float = 0.0
    guidance_scale: float | None = None
    labels: str | None = None
    prompts: str | None = None
    clip: str | None = None
    calibration: Mapping[str, int]
    samples: int
    batch_size: int
    seed: int = 0
    reference: str
    feature_network: str
    metrics: Sequence[str]
    unsupported: Mapping[str, str] = field(default_factory=dict)
    differences: Sequence[str] = ()
    ambiguous: str | None = None

    def __post_init__(self) -> None:
        _one_of(self, "pipeline_class", PIPELINE_CLASSES)
        _one_of(self, "labels", (None, "even"))
        for key in (*self.published, *self.metrics):
            if key not in METRICS:
                raise ReportError(f"unknown metric {key!r}; allowed are {', '.join(METRICS)}")
        if set(self.calibration) != _CALIBRATION:
            raise ReportError(
                f"calibration has {sorted(self.calibration)}; it must have {sorted(_CALIBRATION)}"
            )
        if self.clip is not None and self.prompts is None:
            raise ReportError("it has a clip, but no prompts to score the images against; add them")
        if self.recipe is None and self.plan is not None:
            raise ReportError("it corrects the float model; give a recipe, or no correction")
        self.correction()
        self.compression()

    @property
    def key(self) -> str:
        """Return a name for the settings that a calibration set depends on; equal keys share the set."""
        names = ("pipeline", "pipeline_class", "scheduler", "steps", "eta", "guidance_scale", "labels")
        value = {name: getattr(self, name) for name in (*names, "prompts", "calibration")}
        return f"{self.dataset.lower()}-{digest_of(value)}"

    def compression(self) -> Recipe | None:
        """Return the recipe; None for the float model.

        Raises:
            RecipeError: no such recipe.
        """
        return None if self.recipe is None else Recipe.named(self.recipe)

    def correction(self) -> Plan:
        """Return the plan; one that corrects nothing if the row has none.

        Raises:
            PlanError: a malformed expression of steps, or a choice out of range.
            ReportError: an unknown method, or one of its fields.
        """
        if self.plan is None:
            return Plan.none()
        choices = dict(self.plan)
        name, steps = choices.pop("method", None), choices.pop("steps", "all")
        if name not in METHODS:
            raise ReportError(f"unknown method {name!r}; allowed are {', '.join(METHODS)}")
        try:
            return Plan(METHODS[name](**choices), steps)
        except TypeError as problem:
            raise ReportError(f"{name} has no such option: {problem}") from problem

    @property
    def plan_name(self) -> str:
        """Return the name of its plan in the report."""
        return "none" if self.plan is None else f"{self.plan['method']} {self.plan.get('steps', 'all')}"

    def changed(self, **changes: Any) -> Row:
        """Return the row with other settings; those that are None stay as they are."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """Return all fields as a plain JSON value."""
        return asdict(self)


def digest_of(value: Any) -> str:
    """Return eight hexadecimal digits that tell settings apart."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _one_of(row: Row, name: str, allowed: Sequence[str | None]) -> None:
    if (value := getattr(row, name)) not in allowed:
        raise ReportError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}")
