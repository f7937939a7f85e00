"""Codes and ranges of an earlier compression, taken over by another one with the same quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from errata.calibration import CalibrationSet
from errata.calibration.document import FINISHED
from errata.canonical_json import file_digest
from errata.compress.compressed import CompressedPipeline
from errata.compress.jobs.journal import differences
from errata.errors import RecipeError
from errata.runtime.feature_correction import FEATURE, OUTPUT
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.scheme import Scheme


def origin_of(calibration_set: CalibrationSet, *, samples_per_step: int) -> dict[str, Any]:
    """What a compressed pipeline says of the data that its numbers come from."""
    return {
        "fingerprint": calibration_set.fingerprint,
        "data_sha256": file_digest(calibration_set.path / FINISHED),
        "num_samples": calibration_set.num_samples,
        "samples_per_step": min(samples_per_step, calibration_set.num_samples),
    }


def taken_table(earlier: CompressedPipeline, recipe: Recipe, origin: Mapping[str, Any]) -> dict[str, Tensor]:
    """The table of `earlier` without its cache correction: what the same quantization would come to again.

    Raises:
        TypeError: not a `CompressedPipeline`.
        RecipeError: it has another quantization, model or calibration data; or none at all.
    """
    if not isinstance(earlier, CompressedPipeline):
        raise TypeError(
            f"reuse is a {type(earlier).__name__}; open one with errata.compress.load(path), or leave it out"
        )
    compression = earlier.compression
    if recipe.quantization is None or compression.recipe.quantization is None:
        raise RecipeError(
            f"nothing of `{earlier.path}` ({compression.recipe.name}) can be reused for {recipe.name}: one "
            "of them quantizes nothing; leave reuse out"
        )
    was = {"quantization": compression.recipe.quantization.to_json(), **compression.calibration}
    now = {"quantization": recipe.quantization.to_json(), **origin}
    if found := differences(was, now):
        raise RecipeError(
            f"`{earlier.path}` cannot be reused for {recipe.name}: {'; '.join(found)}; leave reuse out, or "
            "take a result with the same quantization, model and calibration data"
        )
    left_out = _correction_names(compression.scheme)
    return {name: value for name, value in compression.table.items() if name not in left_out}


def _correction_names(scheme: Scheme) -> frozenset[str]:
    """Names of the numbers that correct a cache."""
    if scheme.correction is None:
        return frozenset()
    layers = (layer.name for layer in scheme.correction.layers)
    return frozenset(FEATURE) | {pattern.format(layer=name) for name in layers for pattern in OUTPUT}
