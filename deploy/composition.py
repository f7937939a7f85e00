"""`model_index.json`: which pipeline an artifact makes, of which components, with which settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from errata.deploy.component_files import check_version
from errata.deploy.manifest import MANIFEST_FILE, Manifest
from errata.deploy.sharding import is_denoiser_file
from errata.deploy.strict_json import json_object
from errata.errors import ArtifactCorruptError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODEL_INDEX = "model_index.json"
DENOISER = "unet"
SCHEDULER = "scheduler"
# What components consist of. No pickle and no program is among them: opening a file must run nothing.
_SUFFIXES = (".json", ".safetensors", ".txt", ".model")
# They name further files or models, which no digest here would cover.
_REDIRECTIONS = ("adapter_config.json",)
_REDIRECTING_SUFFIX = ".index.json"
_OWN_FILES = {
    DENOISER: {"config.json"},  # and the denoiser's tensors, see `is_denoiser_file`
    SCHEDULER: {"scheduler_config.json"},
}


@dataclass(frozen=True, kw_only=True)
class Composition:
    """The checked content of `model_index.json`.

    Attributes:
        pipeline: class of the pipeline.
        components: library and class name of each component; None where the pipeline does without.
        settings: the constructor's other arguments.
    """

    pipeline: type[DiffusionPipeline]
    components: Mapping[str, tuple[str, str] | None]
    settings: Mapping[str, Any]


def check_composition(root: Path, manifest: Manifest) -> Composition:
    """Read `model_index.json` and compare it with the allow-lists, the manifest and the files.

    Raises:
        ArtifactCorruptError: it is invalid, or names what is not there, does not fit, or is not allowed.
        ArtifactVersionError: a class that these versions do not have.
        ArtifactError: a class whose library is not installed.
    """
    from errata.deploy.allowlist import component_class  # with diffusers, which a known composition lacks

    composition = _read(root / MODEL_INDEX)
    _check_signature(root, composition)
    for entry in composition.components.values():
        if entry is not None:
            component_class(*entry)
    _check_entry(root, composition, DENOISER, manifest.unet_class)
    _check_entry(root, composition, SCHEDULER, manifest.sampler.scheduler_class)
    present = {name for name, entry in composition.components.items() if entry is not None}
    check_places(root, present, manifest)
    return composition


def _read(file: Path) -> Composition:
    from errata.deploy.allowlist import pipeline_class

    index = json_object(file)
    check_version(index, file)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ArtifactCorruptError(f"{file} names no pipeline class; it was not written by errata")
    components: dict[str, tuple[str, str] | None] = {}
    settings: dict[str, Any] = {}
    for key, value in index.items():
        match value:
            case _ if key in ("_class_name", "_diffusers_version"):
                continue
            case [None, None]:
                components[key] = None
            case [str(library), str(class_name)]:
                components[key] = (library, class_name)
            case None | bool() | int() | float() | str():
                settings[key] = value
            case _:
                raise ArtifactCorruptError(
                    f"{file}: {key!r} is neither a component nor a setting; it was not written by errata"
                )
    return Composition(pipeline=pipeline_class(name), components=components, settings=settings)


def _check_signature(root: Path, composition: Composition) -> None:
    """Check that the pipeline takes what the artifact has, as components or settings, and needs no more."""
    name, optional = composition.pipeline.__name__, set(composition.pipeline._optional_components)
    parameters = dict(inspect.signature(composition.pipeline.__init__).parameters)
    parameters.pop("self")
    needed = {key for key, parameter in parameters.items() if parameter.default is inspect.Parameter.empty}
    taken = needed | optional, set(parameters) - needed - optional
    for given, allowed in zip((composition.components, composition.settings), taken, strict=True):
        if extra := sorted(set(given) - allowed):
            raise ArtifactCorruptError(
                f"{root / MODEL_INDEX}: {name} does not take {extra[0]!r}; deploy again"
            )
    present = {key for key, entry in composition.components.items() if entry is not None}
    if missing := sorted(needed - optional - present):
        raise ArtifactCorruptError(
            f"{root} does not make a {name}: {MODEL_INDEX} has no {missing[0]!r}; deploy again"
        )


def _check_entry(root: Path, composition: Composition, component: str, expected: str) -> None:
    entry = composition.components.get(component)
    if entry is None or entry[1] != expected:
        found = None if entry is None else entry[1]
        raise ArtifactCorruptError(
            f"{root / MODEL_INDEX}: component {component!r} is {found!r}, {MANIFEST_FILE} says {expected!r}; "
            "it was not written by errata"
        )


def check_places(root: Path, present: Set[str], manifest: Manifest) -> None:
    """Check that every component has files, every file a component, and none can run or fetch anything.

    Raises:
        ArtifactCorruptError: naming the file or the component.
    """
    for file in sorted(manifest.files):
        folder, *rest = PurePosixPath(file).parts
        if file == MODEL_INDEX:
            continue
        if folder not in present or len(rest) != 1:
            raise ArtifactCorruptError(f"{root / file} belongs to no component of {MODEL_INDEX}; remove it")
        name = rest[0]
        is_redirection = name in _REDIRECTIONS or name.endswith(_REDIRECTING_SUFFIX)
        is_own = name in _OWN_FILES.get(folder, {name}) or is_denoiser_file(file)
        if not name.endswith(_SUFFIXES) or is_redirection or not is_own:
            raise ArtifactCorruptError(
                f"{root / file} is not allowed: a component holds {', '.join(_SUFFIXES)} files that refer to "
                "no others, never pickles or programs; deploy again"
            )
    for name in sorted(present - {PurePosixPath(file).parts[0] for file in manifest.files}):
        raise ArtifactCorruptError(f"{root} has no files of component {name!r}; copy the artifact again")
