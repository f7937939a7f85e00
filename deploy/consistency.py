"""Checks that a manifest agrees with itself, its recipe, the network and the artifact's other files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from errata.canonical_json import dumps
from errata.deploy.limits import MOST_MATCHES
from errata.deploy.manifest import MANIFEST_FILE, Manifest
from errata.deploy.strict_json import json_object
from errata.errors import ArtifactCorruptError, RecipeError
from errata.runtime.sampler import calls_per_step
from errata.runtime.scheme import Scheme
from errata.runtime.structure import check_supported, largest_branch

if TYPE_CHECKING:
    from errata.runtime.structure import Network

UNET_CONFIG = "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
MODEL_INDEX = "model_index.json"


def check_consistency(root: Path, unet: Network, manifest: Manifest) -> None:
    """Derive scheme, schedule and size anew, and compare the sampler with the artifact's other files.

    A scheme that left a layer out would let its float weights pass, so it must be the one that the recipe
    means for this very network. A searched schedule cannot be derived; it must be one that a search may find.

    Raises:
        ArtifactCorruptError: naming what does not fit.
    """
    recipe, sampler = manifest.recipe, manifest.sampler
    _check_sizes(root, unet, manifest)
    _check_streams(root, manifest)
    index, scheduler = json_object(root / MODEL_INDEX), json_object(root / SCHEDULER_CONFIG)
    try:
        check_supported(unet)
        most = largest_branch(unet)
        scheme = Scheme.of(unet, recipe, branch=manifest.schedule.branch)
        is_schedule_allowed = recipe.allows(manifest.schedule)
    except RecipeError as error:
        raise ArtifactCorruptError(f"{root}: {error}; it was not written by errata") from error
    float32_bytes = 4 * sum(value.numel() for value in unet.state_dict().values())
    agrees = {
        "scheme": dumps(manifest.scheme.to_json()) == dumps(scheme.to_json()),  # where 1 is not true
        "schedule": is_schedule_allowed and manifest.schedule.branch <= most,
        "num_inference_steps": 1 <= sampler.num_inference_steps <= len(sampler.timesteps),
        "float32_weight_bytes": manifest.float32_weight_bytes == float32_bytes,
        "scheduler_config": manifest.scheduler_config == scheduler,
        "scheduler_class": scheduler.get("_class_name") == sampler.scheduler_class,
        "unet_class": json_object(root / UNET_CONFIG).get("_class_name") == manifest.unet_class,
        "pipeline_class": index.get("_class_name") == manifest.pipeline_class,
    }
    for name, holds in agrees.items():
        if not holds:
            raise _contradiction(root, manifest, name)


def _contradiction(root: Path, manifest: Manifest, name: str) -> ArtifactCorruptError:
    return ArtifactCorruptError(
        f"{root / MANIFEST_FILE}: {name} does not fit the recipe {manifest.recipe.name[:200]}, the network "
        "or the artifact's other files; it was not written by errata"
    )


def _check_sizes(root: Path, unet: Network, manifest: Manifest) -> None:
    """Check what the derivations below cost, before they are made."""
    if len(manifest.sampler.timesteps) != manifest.schedule.num_steps:
        raise _contradiction(root, manifest, "timesteps")
    quantization = manifest.recipe.quantization
    patterns = 0 if quantization is None else len(quantization.patterns)
    modules = sum(1 for _ in unet.modules())
    if patterns * modules > MOST_MATCHES:
        raise ArtifactCorruptError(
            f"{root / MANIFEST_FILE}: {patterns:,} patterns for {modules:,} modules are too many to compare; "
            f"allowed are {MOST_MATCHES:,} pairs"
        )


def _check_streams(root: Path, manifest: Manifest) -> None:
    """Check that a cache keeps the calls of a sampler step apart; without a cache nothing depends on it."""
    found, expected = manifest.schedule.calls_per_step, calls_per_step(manifest.sampler.timesteps or (0.0,))
    if found != expected and (manifest.schedule.has_cache or found != 1):
        raise ArtifactCorruptError(
            f"{root / MANIFEST_FILE}: its timesteps have {expected} denoiser calls in each sampler step, its "
            f"schedule has calls_per_step={found}: a cached call would read the feature of another call; "
            "compress the pipeline again"
        )
