"""What the files of a component may say: checked before any library reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata.deploy.limits import LARGEST_JSON, LARGEST_NUMBER, LARGEST_SCHEDULER_NUMBER
from errata.deploy.safetensors_header import read_header
from errata.deploy.strict_json import json_object, json_value, largest_whole_number
from errata.errors import ArtifactCorruptError
from errata.plain_json import from_plain

_CONFIG = "config.json"
# Settings that name a place, a program, or a kernel to be fetched (transformers 5): an artifact has none.
_PLACES = {
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path",
    "attn_implementation", "auto_map", "custom_pipelines", "experts_implementation", "name_or_path",
    "use_kernels",
}  # fmt: skip
_PLACE_SUFFIX = "_file"
_VERSION = "_diffusers_version"
_VERSION_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9}){0,4}((\.dev|rc|\.post)\d{1,9})?(\+[a-z0-9.]{1,40})?")
FOREIGN_FORMAT = "quantization_config"


def check_component(folder: Path) -> None:
    """Check that JSON and safetensors are valid, and that no setting makes a loader look elsewhere.

    Raises:
        ArtifactCorruptError: naming the file.
    """
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(_CONFIG):
            _check_settings(json_object(file), file)
        else:
            json_value(file, largest=LARGEST_JSON)
    for file in sorted(folder.glob("*.safetensors")):
        read_header(file)


def _check_settings(settings: dict[str, Any], file: Path) -> None:
    if FOREIGN_FORMAT in settings or settings != without_places(settings):
        raise ArtifactCorruptError(
            f"{file} has a setting that names a file, a model or a program; it was not written by errata"
        )
    check_version(settings, file)


def check_version(settings: Mapping[str, Any], file: Path) -> None:
    """Check that diffusers can read the version of diffusers that settings state.

    Raises:
        ArtifactCorruptError: naming it.
    """
    stated = settings.get(_VERSION, "0")
    if not isinstance(stated, str) or not _VERSION_NUMBER.fullmatch(stated):
        raise ArtifactCorruptError(
            f"{file} has {_VERSION}={str(stated)[:80]!r}, which is not a version number; deploy again"
        )


def without_places(value: Any) -> Any:
    """Return settings without those that name a place, a program or a kernel to be fetched."""
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: without_places(item)
        for key, item in value.items()
        if key not in _PLACES and not key.endswith(_PLACE_SUFFIX)
    }


def network_settings(file: Path) -> Any:
    """Return the settings of a network, whose numbers are of a size that one has.

    Raises:
        ArtifactCorruptError: they are no JSON object, or a number is out of range.
    """
    return _settings(file, LARGEST_NUMBER)


def scheduler_settings(file: Path) -> Any:
    """Return the settings of a scheduler, which makes arrays and lists of the lengths that they name.

    Raises:
        ArtifactCorruptError: as in `network_settings`.
    """
    return _settings(file, LARGEST_SCHEDULER_NUMBER)


def _settings(file: Path, largest: int) -> Any:
    settings = json_object(file)
    if (number := largest_whole_number(settings)) > largest:
        raise ArtifactCorruptError(
            f"{file} has a setting of {str(number)[:40]}; whole numbers there are at most {largest:,}"
        )
    try:
        return from_plain(settings)
    except ValueError as error:  # an invalid `$float`
        raise ArtifactCorruptError(
            f"{file} is not readable: {error}; it was not written by errata"
        ) from error
