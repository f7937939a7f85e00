"""What is checked and decided before any work: a UNet that can be served, its scheme, the request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import errata
from errata.calibration import CalibrationSet, model_fingerprint
from errata.calibration.document import FINISHED
from errata.canonical_json import file_digest
from errata.compress.compressed import CompressedPipeline
from errata.errors import CalibrationError, RecipeError
from errata.fingerprint import public_config
from errata.large_weights import stored_weights
from errata.plain_json import from_plain
from errata.request_differences import differences
from errata.runtime.feature_correction import FEATURE, OUTPUT
from errata.runtime.output_map import OUTPUT_MAP
from errata.runtime.recipes.caching import CacheQuant
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.scheme import Scheme
from errata.runtime.structure import cut_at, default_branch
from errata.runtime.unet import BranchedUNet

# Components that make a pipeline a latent one, by diffusers' names.
_AUTOENCODERS = ("vae", "vqvae", "movq")
# DeepCache's setting for latent models (Ma et al., CVPR 2024): the last resnet.
_LATENT_BRANCH = 1
_WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A recipe as it applies to one pipeline.

    Attributes:
        recipe: the choices.
        branch: resnets of the up path that a cached step recomputes; 0 without a cache.
        scheme: what is quantized or corrected.
    """

    recipe: Recipe
    branch: int
    scheme: Scheme

    @classmethod
    def of(cls, pipe: DiffusionPipeline, recipe: Recipe) -> Preparation:
        """Return the recipe as it applies to a pipeline, and check that the pipeline can be compressed so.

        Raises:
            RecipeError: naming the layer, block, branch or type of the weights.
        """
        BranchedUNet(pipe.unet)  # refuses networks, adapters and attentions that are not supported
        converted = stored_weights(pipe.unet)  # in whichever type: their layers convert them
        parameters = pipe.unet.named_parameters()
        types = {
            item.dtype for name, item in parameters if item.is_floating_point() and name not in converted
        }
        if len(types) != 1 or not types <= set(_WEIGHT_TYPES):
            found = ", ".join(sorted(str(item).removeprefix("torch.") for item in types))
            raise RecipeError(
                f"the UNet's weights are of type {found}; allowed is one of float32, float16 and bfloat16; "
                "convert them, as with pipe.unet.to(torch.float32), and calibrate again"
            )
        branch = 0 if recipe.cache is None else recipe.cache.branch or branch_of(pipe)
        if branch:
            cut_at(pipe.unet, branch)
        return cls(recipe=recipe, branch=branch, scheme=Scheme.of(pipe.unet, recipe, branch=branch))

    @property
    def is_searched(self) -> bool:
        """Whether the cache schedule depends on the trajectories."""
        return isinstance(self.recipe.cache, CacheQuant) and self.recipe.cache.search == "dps"


def branch_of(pipe: DiffusionPipeline) -> int:
    """Return the papers' branch: 1 for a latent pipeline, else that of its UNet.

    Raises:
        RecipeError: features of this UNet cannot be cached.
    """
    usual = default_branch(pipe.unet)
    is_latent = any(getattr(pipe, name, None) is not None for name in _AUTOENCODERS)
    return _LATENT_BRANCH if is_latent else usual


def request_of(
    unet: nn.Module, origin: Mapping[str, Any], recipe: Recipe, *, samples_per_step: int
) -> dict[str, Any]:
    """Return everything that decides the bytes of the stages, with names that a user understands.

    `origin` names the model and the data, see `origin_of`.
    Sums of floating-point numbers depend on the number of threads and on the processor's vector units.
    """
    device = next(unet.parameters()).device
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "model": origin["fingerprint"],  # that of `unet`, see `check_origin`
        "calibration data": origin["data_sha256"],
        "recipe": recipe.to_json(),
        "samples per step": samples_per_step,
        "device": on,
        "threads": torch.get_num_threads(),
        "vector units": torch.backends.cpu.get_cpu_capability(),
        "versions": {
            "errata": errata.__version__,
            "torch": str(torch.__version__),
            "diffusers": version("diffusers"),
            "brevitas": version("brevitas"),
        },
    }


def check_origin(pipe: DiffusionPipeline, calibration_set: CalibrationSet) -> None:
    """Check that trajectories are of this model and scheduler, and unaltered; reads all of them.

    Raises:
        CalibrationError: naming what differs.
    """
    check_model(pipe, calibration_set)
    calibration_set.verify()


def check_model(pipe: DiffusionPipeline, calibration_set: CalibrationSet) -> None:
    """Check that trajectories are of this model and scheduler; reads none of them.

    Raises:
        CalibrationError: naming what differs.
    """
    check_weights(pipe.unet, calibration_set)
    scheduler = type(pipe.scheduler).__name__
    config = from_plain(public_config(pipe.scheduler.config))  # as the recording gives it back
    if scheduler != calibration_set.scheduler_class:
        raise CalibrationError(
            f"the calibration set {calibration_set.path} was recorded with "
            f"{calibration_set.scheduler_class}, the pipeline has {scheduler}; "
            "use the same scheduler or calibrate again"
        )
    differing = sorted(
        key
        for key in config.keys() | calibration_set.scheduler_config.keys()
        if config.get(key) != calibration_set.scheduler_config.get(key)
    )
    if differing:
        raise CalibrationError(
            f"the calibration set {calibration_set.path} was recorded with other scheduler settings: "
            f"{', '.join(differing)} differ; use the same ones or calibrate again"
        )


def check_weights(unet: nn.Module, calibration_set: CalibrationSet) -> None:
    """Check that trajectories are of this network.

    Raises:
        CalibrationError: with both fingerprints.
    """
    found = model_fingerprint(unet)
    if found != calibration_set.fingerprint:
        raise CalibrationError(
            f"the calibration set {calibration_set.path} was recorded from another model "
            f"(fingerprint {calibration_set.fingerprint[:12]}…, this one has {found[:12]}…); calibrate again"
        )


def origin_of(calibration_set: CalibrationSet, *, samples_per_step: int) -> dict[str, Any]:
    """Return the origin that a compressed pipeline states for its numbers: the model and the data."""
    return {
        "fingerprint": calibration_set.fingerprint,
        "data_sha256": file_digest(calibration_set.path / FINISHED),
        "num_samples": calibration_set.num_samples,
        "samples_per_step": min(samples_per_step, calibration_set.num_samples),
    }


def taken_table(earlier: CompressedPipeline, recipe: Recipe, origin: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the table of `earlier` without what depends on the cache too: its correction and output map.

    Raises:
        TypeError: not a `CompressedPipeline`.
        RecipeError: it has another quantization, model or calibration data; or none at all.
    """
    if not isinstance(earlier, CompressedPipeline):
        raise TypeError(
            f"`reuse` is a {type(earlier).__name__}, not a CompressedPipeline; open one with "
            "errata.compress.load(path), or leave it out"
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
    left_out = _correction_names(compression.scheme) | set(OUTPUT_MAP)
    return {name: value for name, value in compression.table.items() if name not in left_out}


def _correction_names(scheme: Scheme) -> frozenset[str]:
    """Return the names of the numbers that correct a cache."""
    if scheme.correction is None:
        return frozenset()
    layers = (layer.name for layer in scheme.correction.layers)
    return frozenset(FEATURE) | {pattern.format(layer=name) for name in layers for pattern in OUTPUT}
