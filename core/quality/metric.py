"""What a metric is, and which ones errata has.

A metric turns images into one number, and says what it needs, which way is better and how it is measured. The
report's sampling, summary, tables and plots read all of them alike. A module of `errata.quality` declares its
metrics in a tuple `METRICS`, where `known_metrics` finds them; `load_metric` opens one of a user's own.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from errata.errors import ReportError
from errata.quality import formatting
from errata.quality.intervals import Estimate
from errata.quality.moments import FeatureStatistics

Need = Literal["images", "pairs", "prompts", "features", "real features", "logits"]
"""What a metric is computed from; the first three give one number for each image."""

PER_IMAGE: tuple[Need, ...] = ("images", "pairs", "prompts")
PLACES = ("samples", "network", "pairs", "real")
"""What `Metric.description` may name in braces."""

# Metrics of single images come first in every table, those of pairs ahead.
_ORDER: tuple[Need, ...] = ("pairs", "prompts", "images", "features", "real features", "logits")
# Metrics that compare every image with every other look at no more than so many.
MOST_COMPARED = 10_000
HEADLINE = "frechet"
"""The metric that a report's verdicts and plots are about."""
# Numbers in a block of pairs; 8 MB of float64.
_BLOCK = 2**20

Chunks = Callable[[], Iterator[Tensor]]
"""Returns tensors (B, …) afresh at each call, in the order of the samples."""


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Everything that a metric of a whole set of images may look at.

    Attributes:
        features: of the images, `(B, D)` each.
        logits: class scores of the images, `(B, K)` each; None if the feature network has no classifier.
        count: number of images.
        reference: mean and covariance of the real features.
        real: real features, `(M, D)`; None if only their statistics are known.
        resamples: of a bootstrap.
        seed: of a bootstrap; equal seeds and counts draw the same images, so that sets compare in pairs.
    """

    features: Chunks
    logits: Chunks | None = None
    count: int
    reference: FeatureStatistics
    real: Tensor | None = None
    resamples: int = 200
    seed: int = 0

    @cached_property
    def compared(self) -> Tensor:
        """Features of the first `MOST_COMPARED` images, for metrics that compare all pairs."""
        parts, count = [], 0
        for part in self.features():
            parts.append(part)
            count += len(part)
            if count >= MOST_COMPARED:
                break
        return torch.cat(parts)[:MOST_COMPARED]

    @property
    def block(self) -> int:
        """How many rows to compare at a time, for bounded memory."""
        real = 0 if self.real is None else len(self.real)
        return max(1, _BLOCK // max(len(self.compared), real))


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number for a set of images.

    Attributes:
        name: key in `report.json`, such as "psnr".
        title: name in tables and plots, such as "PSNR".
        higher_is_better: direction.
        needs: what `compute` is called with, see below.
        description: how it is measured, one phrase. `{samples}` (a number), `{network}` (the feature
            network's name), `{pairs}` (what images are paired with) and `{real}` (which images are compared
            with which real ones) are filled in.
        compute: the arithmetic. Metrics of single images return `(B,)`, one number for each image. They get
            `(images)` if they need "images", `(images, others)` if "pairs" (other images from the same
            noise), `(images, prompts)` if "prompts"; images are `(B, C, H, W)`, float32 in [0, 1]. Metrics of
            sets get a `SampleSet` and return a `Measured`, or None where they cannot be measured. A metric
            without `compute` is only described: it was measured elsewhere, or needs a model that is not
            loaded.
        unit: such as "dB"; "" for none.
        decimals: how many are printed; None prints as many as the interval justifies.
        in_main_table: whether it stands beside the Fréchet distance.
        model: which model it was computed with, if it needs one.

    Raises:
        ReportError: the name, `needs` or a place in `description` is not allowed.
    """

    name: str
    title: str
    higher_is_better: bool
    needs: Need
    description: str
    compute: Callable[..., Any] | None = None
    unit: str = ""
    decimals: int | None = None
    in_main_table: bool = False
    model: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ReportError(
                f"metric name {self.name!r}: use lower-case letters, digits and underscores, such as 'psnr'"
            )
        if self.needs not in get_args(Need):
            raise ReportError(
                f"metric {self.name!r} needs {self.needs!r}; allowed are "
                f"{', '.join(map(repr, get_args(Need)))}"
            )
        try:
            self.describe(**dict.fromkeys(PLACES, ""))
        except (KeyError, IndexError, ValueError) as problem:
            raise ReportError(
                f"metric {self.name!r}: its description cannot be filled in ({problem!r}); in braces it may "
                f"name {', '.join(PLACES)}"
            ) from problem

    @property
    def is_per_image(self) -> bool:
        """Whether it gives one number for each image."""
        return self.needs in PER_IMAGE

    @property
    def arrow(self) -> str:
        """Arrow in the better direction."""
        return "↑" if self.higher_is_better else "↓"

    def scores(self, images: Tensor, second: Any = None) -> Tensor:
        """Return one number for each image, `(B,)`.

        second: the other images or the prompts, if the metric needs them.

        Raises:
            ReportError: `compute` returns something else.
        """
        assert self.compute is not None  # a described metric is never computed
        given = (images,) if self.needs == "images" else (images, second)
        scores = self.compute(*given)
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ReportError(
                f"metric {self.name!r} returns {shape} for {len(images)} images; it must return one number "
                f"for each image, a tensor of shape ({len(images)},)"
            )
        return scores

    def is_served_by(self, samples: SampleSet) -> bool:
        """Return whether a metric of sets can be computed on this one."""
        missing = {"logits": samples.logits is None, "real features": samples.real is None}
        return self.compute is not None and not self.is_per_image and not missing.get(self.needs, False)

    def describe(self, **places: object) -> str:
        """Return how it is measured, with the `PLACES` of its description filled in."""
        return self.description.format(**places)

    def show(self, estimate: Estimate) -> str:
        """Return the value as text, with its unit."""
        return f"{formatting.value(estimate, decimals=self.decimals)} {self.unit}".rstrip()

    def show_interval(self, estimate: Estimate) -> str:
        """Return the interval as text."""
        return formatting.interval(estimate, decimals=self.decimals)

    def to_json(self) -> dict[str, Any]:
        """Return its description as a plain JSON value; `compute` is left out."""
        return {name: value for name, value in asdict(self).items() if name != "compute"}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Metric:
        """Return a described metric, inverse of `to_json`."""
        return cls(**value)


@cache
def known_metrics() -> tuple[Metric, ...]:
    """Return all metrics that the modules of `errata.quality` declare, those of single images first."""
    package = importlib.import_module("errata.quality")
    names = (f"errata.quality.{found.name}" for found in pkgutil.iter_modules(package.__path__))
    metrics = [metric for name in names for metric in getattr(importlib.import_module(name), "METRICS", ())]
    return tuple(sorted(metrics, key=lambda metric: _ORDER.index(metric.needs)))


def load_metric(spec: str) -> Metric:
    """Return the metric that `package.module:attribute` names.

    Raises:
        ReportError: it cannot be imported, or is not a `Metric`.
    """
    module_name, _, attribute = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as problem:  # the user's code raises whatever it likes
        raise ReportError(
            f"metric `{spec}` cannot be imported: {type(problem).__name__}: {problem}; give "
            "package.module:attribute, of a module that can be imported from here"
        ) from problem
    if not isinstance(found, Metric):
        raise ReportError(f"metric `{spec}` is a {type(found).__name__}; it must be an errata.quality.Metric")
    return found
