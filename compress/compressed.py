"""The compressed pipeline: simulated low-bit UNet, cache schedule, and how it is kept on disk."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from errata.calibration import load_pipeline, model_fingerprint
from errata.canonical_json import dumps, file_digest, loads_strict
from errata.compress.quantize.simulation import simulate
from errata.errors import RecipeError
from errata.large_weights import in_stored_type
from errata.runtime.denoiser import UNetDenoiser
from errata.runtime.feature_correction import FeatureCorrection, correct_outputs
from errata.runtime.output_map import OutputMap
from errata.runtime.paired_change import PairedChange
from errata.runtime.pipeline import SteppedPipeline
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.sampler import Sampler, calls_per_step
from errata.runtime.schedule import CacheSchedule
from errata.runtime.scheme import Scheme
from errata.runtime.step_context import StepContext
from errata.runtime.stepped_unet import SteppedUNet
from errata.runtime.unet import BranchedUNet

_FORMAT = "errata-compressed/4"
# Written by earlier releases, which did not calibrate outputs.
_EARLIER_FORMAT = "errata-compressed/3"
_MANIFEST = "compressed.json"
_QUANTIZERS = "quantizers.safetensors"
_PIPELINE = "pipeline"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What was done to a pipeline: everything but its float weights.

    `table` holds codes, scales and zero points by name (see `errata.compress.quantize.simulation`);
    `calibration` names the data that the ranges come from; `calibrated_output` is what the map of the
    predictions was measured to do, None where there is none or no image to measure it on; `choices` says in
    words what whole images decided, by subject.
    """

    recipe: Recipe
    scheme: Scheme
    schedule: CacheSchedule
    sampler: Sampler
    calibration: Mapping[str, Any]
    table: Mapping[str, Tensor]
    calibrated_output: PairedChange | None = None
    choices: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return all but the table."""
        return {
            "recipe": self.recipe.to_json(),
            "scheme": self.scheme.to_json(),
            "schedule": self.schedule.to_json(),
            "sampler": self.sampler.to_json(),
            "calibration": dict(self.calibration),
            "choices": dict(self.choices),
            "calibrated_output": None if self.calibrated_output is None else self.calibrated_output.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], table: Mapping[str, Tensor]) -> Compression:
        """Undo `to_json`."""
        recipe = Recipe.from_json(value["recipe"])
        if "calibrated_output" not in value["recipe"]:  # an earlier release
            recipe = replace(recipe, calibrated_output=False)
        measured = value.get("calibrated_output")
        return cls(
            recipe=recipe,
            choices=dict(value.get("choices", {})),
            calibrated_output=None if measured is None else PairedChange.from_json(measured),
            scheme=Scheme.from_json(value["scheme"]),
            schedule=CacheSchedule.from_json(value["schedule"]),
            sampler=Sampler.from_json(value["sampler"]),
            calibration=dict(value["calibration"]),
            table=table,
        )


class CompressedPipeline(SteppedPipeline):
    """A float pipeline with its compression simulated; sample it to judge quality before it is deployed.

    Attributes:
        compression: what was done.
        float_pipe: the pipeline that was compressed.
        path: where it is stored.
    """

    def __init__(self, float_pipe: DiffusionPipeline, compression: Compression, path: Path) -> None:
        self.compression = compression
        self.float_pipe = float_pipe
        self.path = path
        super().__init__(
            simulated_pipe(float_pipe, compression),
            num_inference_steps=compression.sampler.num_inference_steps,
        )


def simulated_pipe(float_pipe: DiffusionPipeline, compression: Compression) -> DiffusionPipeline:
    """Return a copy of `float_pipe` with the simulated UNet in place; `float_pipe` is left alone."""
    context = StepContext()
    unet: UNet2DModel = float_pipe.unet
    scheme, table = compression.scheme, compression.table
    simulated = simulate(unet, scheme, table, context)
    correct_outputs(simulated, scheme, table, context=context)
    branched = BranchedUNet(simulated)
    denoiser = UNetDenoiser(
        branched,
        context,
        compression.schedule,
        compression.sampler.timesteps,
        correction=FeatureCorrection.of(scheme, table),
        output_map=OutputMap.of(scheme, table),
    )
    pipe = copy.copy(float_pipe)
    pipe.unet = SteppedUNet(denoiser, unet.config, module=branched)
    pipe.scheduler = copy.deepcopy(float_pipe.scheduler)
    return pipe


def write(float_pipe: DiffusionPipeline, compression: Compression, out: Path) -> None:
    """Write pipeline, table and manifest into the existing directory `out`."""
    saved = copy.copy(float_pipe)
    for name, component in _networks(float_pipe).items():
        setattr(saved, name, in_stored_type(component))
    saved.save_pretrained(out / _PIPELINE, safe_serialization=True)
    save_file(dict(compression.table), out / _QUANTIZERS)
    manifest = {
        "format": _FORMAT,
        **compression.to_json(),
        "dtypes": _dtypes(float_pipe),
        "quantizers_sha256": file_digest(out / _QUANTIZERS),
    }
    (out / _MANIFEST).write_bytes(dumps(manifest))


def load(path: str | Path) -> CompressedPipeline:
    """Open a compressed pipeline that `compress` wrote.

    Raises:
        RecipeError: the directory holds none, it is of another format, or something in it was altered.
        CalibrationError: its pipeline cannot be opened.
    """
    root = Path(path)
    manifest = _read_manifest(root)
    quantizers = root / _QUANTIZERS
    if not quantizers.is_file() or file_digest(quantizers) != manifest.get("quantizers_sha256"):
        raise RecipeError(f"{quantizers} is missing or was altered; compress the pipeline again")
    try:
        dtypes = {str(name): _DTYPES[dtype] for name, dtype in manifest["dtypes"].items()}
        compression = Compression.from_json(manifest, load_file(quantizers))
    except (AttributeError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise RecipeError(
            f"{root / _MANIFEST} cannot be read: {error!r}; compress the pipeline again"
        ) from error
    pipe = load_pipeline(root / _PIPELINE)
    for name, component in _networks(pipe).items():  # opened in float32, which holds the others exactly
        if dtypes.get(name, component.dtype) != component.dtype:
            component.to(dtypes[name])
    if model_fingerprint(pipe.unet) != compression.calibration.get("fingerprint"):
        raise RecipeError(f"{root / _PIPELINE} is not the model that was compressed; compress it again")
    _check_agreement(root, pipe.unet, compression)
    try:
        return CompressedPipeline(pipe, compression, root)
    except (KeyError, RuntimeError) as error:  # a tensor that is missing, or of another shape
        raise RecipeError(
            f"{quantizers} does not fit {root / _MANIFEST}: {error!r}; compress the pipeline again"
        ) from error


def _check_agreement(root: Path, unet: nn.Module, compression: Compression) -> None:
    """Check what follows from the recipe and the network by deriving it again.

    Raises:
        RecipeError: naming what does not fit, or what the network cannot serve.
    """
    recipe, schedule = compression.recipe, compression.schedule
    streams = calls_per_step(compression.sampler.timesteps)
    # Without a cache a schedule need not know of the calls of a sampler step; older ones do not.
    is_silent = not schedule.has_cache and schedule.calls_per_step == 1
    agrees = {
        "scheme": compression.scheme == Scheme.of(unet, recipe, branch=schedule.branch),
        "schedule": recipe.allows(schedule),
        "timesteps": len(compression.sampler.timesteps) == schedule.num_steps,
        "calls_per_step": schedule.calls_per_step == streams or is_silent,
    }
    for name, holds in agrees.items():
        if not holds:
            raise RecipeError(
                f"{root / _MANIFEST}: {name} does not fit the recipe {recipe.name} or the network; compress "
                "the pipeline again"
            )


def _networks(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {
        name: part
        for name, part in pipe.components.items()
        if isinstance(getattr(part, "dtype", None), torch.dtype)
    }


def _dtypes(pipe: DiffusionPipeline) -> dict[str, str]:
    """Return the floating-point type of the weights of every network of the pipeline."""
    return {name: str(part.dtype).removeprefix("torch.") for name, part in _networks(pipe).items()}


def _read_manifest(root: Path) -> dict[str, Any]:
    file = root / _MANIFEST
    if not file.is_file():
        raise RecipeError(
            f"{root} is not a compressed pipeline: it has no {_MANIFEST}; run `errata compress` first"
        )
    try:
        manifest = loads_strict(file.read_bytes())
    except ValueError as error:
        raise RecipeError(f"{file} is not readable: {error}; compress the pipeline again") from error
    if not isinstance(manifest, dict) or manifest.get("format") not in (_FORMAT, _EARLIER_FORMAT):
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise RecipeError(
            f"{file} has format {found!r}; this version reads {_FORMAT!r}; compress the pipeline again"
        )
    return manifest
