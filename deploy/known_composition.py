"""Artifacts of a common composition: a pipeline, a UNet and a scheduler whose settings are known here.

`errata verify` needs neither torch nor diffusers for them. Of anything else nothing is said.

Source: diffusers 0.42, `DDPMPipeline`, `DDIMPipeline`, `DDPMScheduler`, `DDIMScheduler`; tests compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from errata.deploy.component_files import check_version, network_settings, scheduler_settings
from errata.deploy.composition import DENOISER, MODEL_INDEX, SCHEDULER
from errata.deploy.consistency import SCHEDULER_CONFIG, UNET_CONFIG
from errata.deploy.limits import LARGEST_SCHEDULER_NUMBER, MOST_MODULES
from errata.deploy.manifest import Manifest
from errata.deploy.strict_json import json_object
from errata.runtime.unet_outline import UNet2DModel, unet_outline

# They take a UNet and a scheduler, and nothing else.
KNOWN_PIPELINES = ("DDIMPipeline", "DDPMPipeline")
_VERSION = "_diffusers_version"


def known_unet(root: Path, manifest: Manifest) -> UNet2DModel | None:
    """Return the outline of the artifact's float network; None where it is not known.

    Raises:
        ArtifactCorruptError: its configuration cannot be read.
    """
    if manifest.unet_class != "UNet2DModel":
        return None
    settings = network_settings(root / UNET_CONFIG)
    outline = unet_outline(settings) if isinstance(settings, dict) else None  # {"$float": "1"} is a number
    if outline is None:
        return None
    size = sum(1 for _ in outline.modules()) + len(outline.state_dict())
    return outline if size <= MOST_MODULES else None


def is_known_composition(root: Path, manifest: Manifest) -> bool:
    """Return whether `model_index.json` names a known pipeline of exactly a UNet and a known scheduler.

    Raises:
        ArtifactCorruptError: a file cannot be read, or states an impossible version.
    """
    index, settings = json_object(root / MODEL_INDEX), scheduler_settings(root / SCHEDULER_CONFIG)
    check_version(index, root / MODEL_INDEX)
    name = manifest.sampler.scheduler_class
    components = {DENOISER: ["diffusers", manifest.unet_class], SCHEDULER: ["diffusers", name]}
    stated = {key: value for key, value in index.items() if key not in ("_class_name", _VERSION)}
    return (
        index.get("_class_name") in KNOWN_PIPELINES
        and stated == components
        and name in _SCHEDULERS
        and isinstance(settings, dict)
        and is_known_scheduler(settings)
    )


def is_known_scheduler(settings: Mapping[str, Any]) -> bool:
    """Return whether diffusers makes a scheduler of these settings: each is known and allowed."""
    rules = _SCHEDULERS.get(str(settings.get("_class_name")))
    names = set(settings) - {"_class_name", _VERSION}
    return rules is not None and names <= set(rules) and all(rules[name](settings[name]) for name in names)


def _one_of(*allowed: str) -> Callable[[object], bool]:
    return lambda value: type(value) is str and value in allowed


def _is_switch(value: object) -> bool:
    return type(value) is bool


def _is_none(value: object) -> bool:
    return value is None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= 1


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_SCHEDULER_NUMBER


def _is_offset(value: object) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SCHEDULER_NUMBER


_COMMON: Mapping[str, Callable[[object], bool]] = {
    "beta_end": _is_fraction,
    "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2"),
    "beta_start": _is_fraction,
    "clip_sample": _is_switch,
    "clip_sample_range": _is_number,
    "dynamic_thresholding_ratio": _is_number,
    "num_train_timesteps": _is_count,
    "prediction_type": _one_of("epsilon", "sample", "v_prediction"),
    "rescale_betas_zero_snr": _is_switch,
    "sample_max_value": _is_number,
    "steps_offset": _is_offset,
    "thresholding": _is_switch,
    "timestep_spacing": _one_of("leading", "linspace", "trailing"),
    "trained_betas": _is_none,
}
_SCHEDULERS: Mapping[str, Mapping[str, Callable[[object], bool]]] = {
    "DDIMScheduler": {**_COMMON, "set_alpha_to_one": _is_switch},
    "DDPMScheduler": {
        **_COMMON,
        "variance_type": _one_of(
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
        ),
    },
}
