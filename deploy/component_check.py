"""Checks that a component's settings fit its weights, without the memory that the settings ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin

from errata.deploy.allowlist import is_transformers_model
from errata.deploy.component_files import network_settings, scheduler_settings
from errata.deploy.components import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS
from errata.deploy.construction import without_memory
from errata.deploy.safetensors_header import read_header
from errata.errors import ArtifactCorruptError

_CONFIG = "config.json"


def check_fit(folder: Path, kind: type[Any]) -> None:
    """Compare the settings of a network with its weights, and make a scheduler of a scheduler's settings.

    Tokenizers and processors are not made: their files are read when the artifact is loaded.

    Raises:
        ArtifactCorruptError: naming the file that does not fit.
    """
    if issubclass(kind, ModelMixin):
        _check_diffusers_model(folder, kind)
    elif is_transformers_model(kind):
        _check_transformers_model(folder, kind)
    elif issubclass(kind, SchedulerMixin):
        _check_scheduler(folder, kind)


def _check_diffusers_model(folder: Path, kind: type[Any]) -> None:
    settings = network_settings(folder / _CONFIG)
    try:
        with torch.random.fork_rng(devices=[]), without_memory():
            expected = kind.from_config(settings).state_dict()
    except Exception as error:  # diffusers raises errors of any class
        raise _misfit(folder, kind, str(error)) from error
    found = _tensors(folder, DIFFUSERS_WEIGHTS)
    if odd := sorted(set(expected) ^ set(found)):
        trouble = "lack" if odd[0] in expected else "have"
        raise _misfit(folder, kind, f"the weights {trouble} {odd[0]!r}")
    for name, value in expected.items():
        is_float = found[name].dtype.is_floating_point
        if found[name].shape != tuple(value.shape) or is_float != value.is_floating_point():
            raise _misfit(
                folder, kind, f"{name!r} is {found[name].dtype} {found[name].shape}, not {tuple(value.shape)}"
            )


def _check_transformers_model(folder: Path, kind: type[Any]) -> None:
    """Check that settings and weights are as large as each other: transformers renames tensors.

    What is missing, unexpected or of another shape is refused when the model is loaded.
    """
    settings = network_settings(folder / _CONFIG)
    try:
        with torch.random.fork_rng(devices=[]), without_memory():
            model = kind(kind.config_class.from_dict(settings))
            tensors = {id(value): value for value in model.state_dict(keep_vars=True).values()}
    except Exception as error:  # transformers raises errors of any class
        raise _misfit(folder, kind, str(error)) from error
    needed = sum(value.numel() for value in tensors.values())
    found = sum(torch.Size(item.shape).numel() for item in _tensors(folder, TRANSFORMERS_WEIGHTS).values())
    if needed > found:
        raise _misfit(folder, kind, f"the settings ask for {needed:,} numbers, the weights have {found:,}")


def _check_scheduler(folder: Path, kind: type[Any]) -> None:
    file = folder / kind.config_name
    if not file.is_file():
        raise _misfit(folder, kind, f"there is no {kind.config_name}")
    settings = scheduler_settings(file)
    try:
        kind.from_config(settings)
    except Exception as error:  # diffusers raises errors of any class
        raise _misfit(folder, kind, str(error)) from error


def _tensors(folder: Path, name: str) -> Any:
    if not (folder / name).is_file():
        raise ArtifactCorruptError(f"{folder} has no {name}; copy the artifact again")
    return read_header(folder / name).tensors


def _misfit(folder: Path, kind: type[Any], reason: str) -> ArtifactCorruptError:
    first = (reason.splitlines() or ["no reason given"])[0][:300]
    return ArtifactCorruptError(
        f"{folder} does not make a {kind.__name__}: {first}; it was not written by errata"
    )
