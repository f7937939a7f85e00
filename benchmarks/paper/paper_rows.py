"""The configuration of one row of a table of the paper: a short file, and the file of its model.

A row's file says what the row is (`table`, `row`, `recipe`, `plan`, `published`); the file under `base` says
how its model is sampled, calibrated and judged. A key that both have is the row's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

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
    """One row of a table, with all that decides what is measured.

    Attributes:
        name: of its file, without the ending.
        table: number in the paper.
        row: its name as printed.
        model, dataset, image_size: what the paper says of them.
        recipe: name of a `compress.Recipe`; None is the float model.
        plan: `{method, steps}` and fields of the method; None corrects nothing.
        published: printed texts by metric; None where the table has nothing.
        pipeline: hub name or directory.
        pipeline_class: what samples with its networks.
        scheduler: `class` of diffusers, and settings over those that the pipeline came with.
        steps, eta, guidance_scale: of the sampler; None is no guidance.
        labels: "even", for a model that takes class labels.
        prompts: file of captions, one a line, for a model that takes text.
        clip: CLIP of the CLIP score, hub name or directory; None leaves the score out.
        calibration: samples, batch_size, seed.
        samples, batch_size, seed: of the images that are judged.
        reference: real images or their statistics, as `errata.quality.Reference.open` takes them.
        feature_network: as `errata.quality.open_network` takes it.
        metrics: columns of the table in the paper.
        unsupported: what the toolkit cannot serve, with the reason.
        differences: from the paper's protocol, or what that leaves open.
        ambiguous: what the printed table leaves open.
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
                raise ReportError(
                    f"`{self.name}`: metric {key!r} is unknown; allowed are {', '.join(METRICS)}"
                )
        if set(self.calibration) != _CALIBRATION:
            raise ReportError(
                f"`{self.name}`: calibration has {sorted(self.calibration)}; it needs {sorted(_CALIBRATION)}"
            )
        if self.clip is not None and self.prompts is None:
            raise ReportError(f"`{self.name}` has a clip, but no prompts to score images by; add them")
        if self.recipe is None and self.plan is not None:
            raise ReportError(f"`{self.name}` corrects the float model; give a recipe, or `plan: null`")
        self.correction()
        self.compression()

    @property
    def key(self) -> str:
        """Names the settings that a calibration set depends on; rows that share it share the set."""
        names = ("pipeline", "pipeline_class", "scheduler", "steps", "eta", "guidance_scale", "labels")
        value = {name: getattr(self, name) for name in (*names, "prompts", "calibration")}
        return f"{self.dataset.lower()}-{digest_of(value)}"

    def compression(self) -> Recipe | None:
        """The recipe; None for the float model.

        Raises:
            RecipeError: no such recipe.
        """
        return None if self.recipe is None else Recipe.named(self.recipe)

    def correction(self) -> Plan:
        """The plan; one that corrects nothing where the row has none.

        Raises:
            PlanError: a malformed expression of steps, or a choice out of range.
            ReportError: an unknown method, or one of its fields.
        """
        if self.plan is None:
            return Plan.none()
        choices = dict(self.plan)
        name, steps = choices.pop("method", None), choices.pop("steps", "all")
        if name not in METHODS:
            raise ReportError(f"`{self.name}`: method {name!r} is unknown; allowed are {', '.join(METHODS)}")
        try:
            return Plan(METHODS[name](**choices), steps)
        except TypeError as problem:
            raise ReportError(f"`{self.name}`: {name} has no such choice: {problem}") from problem

    @property
    def plan_name(self) -> str:
        """How the report calls its plan."""
        return "none" if self.plan is None else f"{self.plan['method']} {self.plan.get('steps', 'all')}"

    def changed(self, **changes: Any) -> Row:
        """The same row with other settings; those that are None stay as they are."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON value of everything in it."""
        return asdict(self)


def load_row(path: Path) -> Row:
    """The row that a file describes.

    Raises:
        ReportError: no such file, no mapping, or an unknown or missing key.
    """
    own = _mapping(path)
    base = own.pop("base", None)
    shared = {} if base is None else _mapping(path.parent / base)
    merged = {**shared, **own, "name": path.stem}
    merged["unsupported"] = {**shared.get("unsupported", {}), **own.get("unsupported", {})}
    known = set(Row.__dataclass_fields__)
    if odd := sorted(merged.keys() - known):
        raise ReportError(f"`{path}`: unknown key {odd[0]!r}; allowed are base, {', '.join(sorted(known))}")
    try:
        return Row(**merged)
    except TypeError as problem:
        raise ReportError(f"`{path}` is incomplete: {problem}; add it there or in its base") from problem


def load_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of files, and of all files in folders, in order.

    Raises:
        ReportError: as `load_row`, or a folder without a row.
    """
    rows: list[Row] = []
    for path in paths:
        files = sorted(path.glob("*.yaml"), key=_natural) if path.is_dir() else [path]
        if not files:
            raise ReportError(f"`{path}` holds no .yaml file; give a row's file, or a folder of them")
        rows += map(load_row, files)
    return rows


def digest_of(value: Any) -> str:
    """Eight hexadecimal digits that tell settings apart."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _natural(path: Path) -> list[tuple[int, str]]:
    """Orders names as people do: N = 3 before N = 10, and a row before the one that corrects it."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.stem)]


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as problem:
        raise ReportError(f"`{path}` cannot be read as YAML: {problem}; give the file of a row") from problem
    if not isinstance(value, dict):
        raise ReportError(f"`{path}` holds a {type(value).__name__}; a row is a mapping of keys to values")
    return value


def _one_of(row: Row, name: str, allowed: Sequence[str | None]) -> None:
    if (value := getattr(row, name)) not in allowed:
        raise ReportError(f"`{row.name}`: {name} is {value!r}; allowed are {', '.join(map(str, allowed))}")
