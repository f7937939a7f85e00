"""The manifest of an artifact, `errata.json`: contents, sampler, and the digest of every byte."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errata.canonical_json import digest, dumps
from errata.deploy.limits import LARGEST_MANIFEST, LONGEST_PATTERN, MOST_CALLS
from errata.deploy.strict_json import bounded_json
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError, RecipeError
from errata.runtime.paired_change import PairedChange
from errata.runtime.recipes.recipe import Recipe
from errata.runtime.sampler import Sampler
from errata.runtime.schedule import CacheSchedule
from errata.runtime.scheme import Scheme

FORMAT = "errata-artifact/2"
# Written by earlier releases: without `calibrated_output`, there and in the recipe.
FIRST_FORMAT = "errata-artifact/1"
FORMATS = (FORMAT, FIRST_FORMAT)
MANIFEST_FILE = "errata.json"
DIGEST_KEY = "manifest_sha256"
_KEYS = {
    "format", "made_by", "pipeline_class", "unet_class", "recipe", "scheme", "schedule", "sampler",
    "scheduler_config", "calibration", "calibrated_output", "float32_weight_bytes", "files",
}  # fmt: skip
_ADDED_KEY = "calibrated_output"
_FILE_KEYS = {"bytes", "sha256"}
# What is told of an artifact goes to terminals and web pages.
_PLAIN_TEXT = re.compile(r"[ -~]{1,200}")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and SHA-256 of one file of the artifact."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or self.bytes < 0 or type(self.sha256) is not str:
            raise ValueError(
                "a file record needs a size and a digest, "
                f"got {str(self.bytes)[:80]}, {str(self.sha256)[:80]}"
            )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Typed view of `errata.json`.

    Attributes:
        made_by: versions of errata, torch and diffusers.
        pipeline_class: diffusers class that runs the artifact.
        unet_class: diffusers class of the denoiser.
        sampler: scheduler class, number of steps and timesteps that the activation scales belong to.
        scheduler_config: the scheduler's configuration.
        calibration: fingerprint of the float model and size of the calibration data.
        calibrated_output: what the calibrated output was measured to do; None where there is none, or no
            image to measure it on.
        float32_weight_bytes: what the denoiser's weights take in float32.
        files: every other file, by path relative to the artifact.
        format: version of the format, one of `FORMATS`.
    """

    made_by: Mapping[str, str]
    pipeline_class: str
    unet_class: str
    recipe: Recipe
    scheme: Scheme
    schedule: CacheSchedule
    sampler: Sampler
    scheduler_config: Mapping[str, Any]
    calibration: Mapping[str, Any]
    float32_weight_bytes: int
    files: Mapping[str, FileRecord]
    calibrated_output: PairedChange | None = None
    format: str = FORMAT

    @property
    def is_quantized(self) -> bool:
        """Whether any layer is quantized; a cache-only recipe keeps the float weights."""
        return bool(self.scheme.layers)

    @property
    def artifact_bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(record.bytes for record in self.files.values())

    @property
    def denoiser_bytes(self) -> int:
        """Size of the denoiser's files."""
        return sum(record.bytes for path, record in self.files.items() if path.startswith("unet/"))

    def to_json(self) -> dict[str, Any]:
        """Return a plain JSON value, without the manifest's own digest."""
        recipe = self.recipe.to_json()
        value = {
            "format": self.format,
            "made_by": dict(self.made_by),
            "pipeline_class": self.pipeline_class,
            "unet_class": self.unet_class,
            "recipe": recipe,
            "scheme": self.scheme.to_json(),
            "schedule": self.schedule.to_json(),
            "sampler": self.sampler.to_json(),
            "scheduler_config": dict(self.scheduler_config),
            "calibration": dict(self.calibration),
            "float32_weight_bytes": self.float32_weight_bytes,
            "files": {path: vars(record) for path, record in self.files.items()},
        }
        if self.format == FIRST_FORMAT:
            del recipe[_ADDED_KEY]
            return value
        measured = self.calibrated_output
        return {**value, _ADDED_KEY: None if measured is None else measured.to_json()}

    @property
    def sha256(self) -> str:
        """The artifact's identity: digest of everything above, hence of every file."""
        return digest(self.to_json())

    @property
    def artifact_sha256(self) -> str:
        """The identity of the artifact whose network this is; an engine names another one than its own."""
        return self.sha256

    def summary(self) -> str:
        """Return one line for people."""
        ratio = self.denoiser_bytes / self.float32_weight_bytes
        scheme = f"{len(self.scheme.layers)} layers quantized" if self.is_quantized else "nothing quantized"
        steps, calls = self.schedule.num_steps, self.schedule.calls_per_step
        cached = (steps - len(self.schedule.full_steps)) // calls
        of_calls = f" of {calls} calls" if calls > 1 else ""
        return (
            f"{self.recipe.name}: {scheme}, {steps // calls} steps{of_calls} ({cached} cached), "
            f"{self.denoiser_bytes:,} bytes, {ratio:.3f} of the float32 weights"
        )

    def write(self, root: Path) -> None:
        """Write `errata.json`, canonical, with its own digest."""
        (root / MANIFEST_FILE).write_bytes(dumps({**self.to_json(), DIGEST_KEY: self.sha256}))


def read_manifest(root: Path) -> Manifest:
    """Read `errata.json`; refuse any byte that the writer would not have written.

    Raises:
        ArtifactError: there is no artifact at `root`.
        ArtifactVersionError: another format version.
        ArtifactCorruptError: not canonical, altered, or not a manifest.
    """
    return parse_manifest(read_sealed(root, MANIFEST_FILE, FORMATS), root / MANIFEST_FILE)


def read_sealed(root: Path, name: str, forms: Sequence[str]) -> dict[str, Any]:
    """Return the content of a canonical JSON file of one of these formats, without its own digest.

    Raises:
        ArtifactError: there is no such file.
        ArtifactVersionError: another format version.
        ArtifactCorruptError: not canonical, or altered.
    """
    file = root / name
    data = _read(root, file)
    try:
        value = bounded_json(data)
    except ValueError as error:
        raise ArtifactCorruptError(f"{file} is not valid JSON ({error}); copy the artifact again") from error
    if not isinstance(value, dict):
        raise ArtifactCorruptError(
            f"{file} holds a {type(value).__name__}, not a manifest; copy the artifact again"
        )
    if value.get("format") not in forms:
        raise ArtifactVersionError(
            f"{file} has format {str(value.get('format'))[:80]!r}; this version reads "
            f"{' and '.join(map(repr, forms))}"
        )
    stated = value.pop(DIGEST_KEY, None)
    try:
        is_intact = stated == digest(value) and data == dumps({**value, DIGEST_KEY: stated})
    except ValueError:  # text that no canonical JSON can hold
        is_intact = False
    if not is_intact:
        raise ArtifactCorruptError(
            f"{file} was altered: its own digest does not match; copy the artifact again"
        )
    return value


def _read(root: Path, file: Path) -> bytes:
    if file.is_symlink():
        raise ArtifactCorruptError(f"{file} is a link or special file; an artifact holds plain files only")
    if not file.is_file():
        raise ArtifactError(
            f"{root} is not an artifact: it has no {file.name}; make one with `errata deploy`"
        )
    if (size := file.stat().st_size) > LARGEST_MANIFEST:
        raise ArtifactCorruptError(f"{file} has {size:,} bytes; a manifest has at most {LARGEST_MANIFEST:,}")
    return file.read_bytes()


def parse_manifest(value: dict[str, Any], file: Path) -> Manifest:
    """Return the manifest that the content of a file, without its digest, describes.

    Raises:
        ArtifactCorruptError: it is not a manifest.
    """
    keys = _KEYS - {_ADDED_KEY} if value.get("format") == FIRST_FORMAT else _KEYS
    if missing := sorted(keys - set(value)):
        raise ArtifactCorruptError(f"{file} has no keys {missing}; it was not written by errata")
    if extra := sorted(set(value) - keys):
        raise ArtifactCorruptError(
            f"{file} has unknown keys: {str(extra)[:200]}; it was not written by errata"
        )
    try:
        manifest = _typed(value)
        _check_spelling(value, manifest)
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise ArtifactCorruptError(
            f"{file} is not a readable manifest: {str(error)[:500]}; it was not written by errata"
        ) from error
    return manifest


def _typed(value: dict[str, Any]) -> Manifest:
    for key in ("made_by", "calibration", "scheduler_config", "files"):
        if not isinstance(value[key], dict):
            raise TypeError(f"{key} is a {type(value[key]).__name__}, not an object")
    measured = value.get(_ADDED_KEY)
    return Manifest(
        made_by=plain_texts("made_by", value["made_by"]),
        pipeline_class=value["pipeline_class"],
        unet_class=value["unet_class"],
        recipe=_recipe(value["recipe"], value["format"]),
        scheme=Scheme.from_json(value["scheme"]),
        schedule=_schedule(value["schedule"]),
        sampler=Sampler.from_json(value["sampler"]),
        scheduler_config=value["scheduler_config"],
        calibration=plain_texts("calibration", value["calibration"]),
        float32_weight_bytes=value["float32_weight_bytes"],
        files=file_records(value["files"]),
        calibrated_output=None if measured is None else PairedChange.from_json(measured),
        format=value["format"],
    )


def _check_spelling(value: dict[str, Any], manifest: Manifest) -> None:
    """Check that what was read would be written the same way; a recipe may leave out what has a default.

    Raises:
        ValueError: naming what would not.
    """
    for key in ("pipeline_class", "unet_class"):
        if type(value[key]) is not str:
            raise ValueError(f"{key} is {str(value[key])[:80]!r}, not a text")
    if type(value["float32_weight_bytes"]) is not int:
        raise ValueError("float32_weight_bytes is not a whole number")
    for key, written in manifest.to_json().items():
        if key != "recipe" and dumps(written) != dumps(value[key]):
            raise ValueError(f"its {key} would be written as {str(written)[:200]}")


def plain_texts(key: str, value: dict[str, Any]) -> dict[str, Any]:
    """Return `value` after checking that its names and values are short and plain.

    Raises:
        ValueError: naming one that is not.
    """
    for name, item in value.items():
        is_plain = type(item) is int or (isinstance(item, str) and _PLAIN_TEXT.fullmatch(item))
        if not (is_plain and _PLAIN_TEXT.fullmatch(name)):
            raise ValueError(f"{key} says {name[:80]!r}: {str(item)[:80]!r}, which is not a short plain text")
    return value


def file_records(value: dict[str, Any]) -> dict[str, FileRecord]:
    """Return the records of files by path.

    Raises:
        ValueError: naming one that is not a record.
    """
    return {path: _file_record(path, record) for path, record in value.items()}


def _file_record(path: str, record: Any) -> FileRecord:
    if not isinstance(record, dict) or set(record) != _FILE_KEYS:
        raise ValueError(f"file {path[:80]!r} does not have exactly the keys {sorted(_FILE_KEYS)}")
    return FileRecord(**record)


def _recipe(value: Any, form: str) -> Recipe:
    recipe = Recipe.from_json(value)
    if form == FIRST_FORMAT:
        if _ADDED_KEY in value:
            raise ValueError(f"a recipe of {form} has no key {_ADDED_KEY!r}")
        recipe = replace(recipe, calibrated_output=False)
    patterns = () if recipe.quantization is None else recipe.quantization.patterns
    longest = max(patterns, key=len, default="")
    if len(longest) > LONGEST_PATTERN:
        raise ValueError(
            f"the pattern {longest[:40]!r}… has {len(longest):,} characters; allowed are {LONGEST_PATTERN}"
        )
    return recipe


def _schedule(value: Any) -> CacheSchedule:
    for key in ("num_steps", "calls_per_step"):  # before lists of such lengths are made
        number = value.get(key, 1)
        if type(number) is not int or not 0 < number <= MOST_CALLS:
            raise ValueError(f"{key}={str(number)[:40]}; allowed are whole numbers from 1 to {MOST_CALLS:,}")
    return CacheSchedule.from_json(value)
