"""The manifest of an artifact, `errata.json`: contents, sampler, and the digest of every byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errata.canonical_json import digest, dumps, loads_strict
from errata.compress.compressed import Sampler
from errata.compress.quantize.scheme import Scheme
from errata.compress.recipes.recipe import Recipe
from errata.compress.recipes.schedule import CacheSchedule
from errata.errors import ArtifactCorrupt, ArtifactError, ArtifactVersionError, RecipeError

FORMAT = "errata-artifact/1"
MANIFEST_FILE = "errata.json"
_DIGEST_KEY = "manifest_sha256"
_KEYS = {
    "format", "made_by", "pipeline_class", "unet_class", "recipe", "scheme", "schedule", "sampler",
    "scheduler_config", "calibration", "float32_weight_bytes", "files",
}  # fmt: skip
# A manifest is a few hundred kilobytes for the largest UNets; more is no manifest.
_LARGEST_MANIFEST = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and SHA-256 of one file of the artifact."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or self.bytes < 0 or type(self.sha256) is not str:
            raise ValueError(f"a file record needs a size and a digest, got {self.bytes!r}, {self.sha256!r}")


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
        float32_weight_bytes: what the denoiser's weights take in float32.
        files: every other file, by path relative to the artifact.
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
        """Plain JSON value, without the manifest's own digest."""
        return {
            "format": FORMAT,
            "made_by": dict(self.made_by),
            "pipeline_class": self.pipeline_class,
            "unet_class": self.unet_class,
            "recipe": self.recipe.to_json(),
            "scheme": self.scheme.to_json(),
            "schedule": self.schedule.to_json(),
            "sampler": self.sampler.to_json(),
            "scheduler_config": dict(self.scheduler_config),
            "calibration": dict(self.calibration),
            "float32_weight_bytes": self.float32_weight_bytes,
            "files": {path: vars(record) for path, record in self.files.items()},
        }

    @property
    def sha256(self) -> str:
        """The artifact's identity: digest of everything above, hence of every file."""
        return digest(self.to_json())

    def summary(self) -> str:
        """One line for people."""
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
        """Writes `errata.json`, canonical, with its own digest."""
        (root / MANIFEST_FILE).write_bytes(dumps({**self.to_json(), _DIGEST_KEY: self.sha256}))


def read_manifest(root: Path) -> Manifest:
    """Reads `errata.json` and refuses any byte that the writer would not have written.

    Raises:
        ArtifactError: there is no artifact at `root`.
        ArtifactVersionError: another format version.
        ArtifactCorrupt: not canonical, altered, or not a manifest.
    """
    file = root / MANIFEST_FILE
    if not file.is_file():
        raise ArtifactError(
            f"{root} is no artifact: it has no {MANIFEST_FILE}; make one with `errata deploy`"
        )
    if file.is_symlink() or file.stat().st_size > _LARGEST_MANIFEST:
        raise ArtifactCorrupt(f"{file} is a link or larger than {_LARGEST_MANIFEST:,} bytes; deploy again")
    data = file.read_bytes()
    try:
        value = loads_strict(data)
    except ValueError as error:
        raise ArtifactCorrupt(f"{file} is not valid JSON ({error}); copy the artifact again") from error
    if not isinstance(value, dict):
        raise ArtifactCorrupt(
            f"{file} holds a {type(value).__name__}, not a manifest; copy the artifact again"
        )
    if value.get("format") != FORMAT:
        raise ArtifactVersionError(
            f"{file} has format {value.get('format')!r}; this version reads {FORMAT!r}"
        )
    stated = value.pop(_DIGEST_KEY, None)
    try:
        is_intact = stated == digest(value) and data == dumps({**value, _DIGEST_KEY: stated})
    except (ValueError, TypeError, RecursionError):  # text that no canonical JSON can hold, for instance
        is_intact = False
    if not is_intact:
        raise ArtifactCorrupt(f"{file} was altered: its own digest does not match; copy the artifact again")
    return _parse(value, file)


def _parse(value: dict[str, Any], file: Path) -> Manifest:
    if set(value) != _KEYS:
        odd = sorted(set(value) ^ _KEYS)
        raise ArtifactCorrupt(f"{file} has missing or unknown keys: {odd}; it was not written by errata")
    try:
        return Manifest(
            made_by=value["made_by"],
            pipeline_class=str(value["pipeline_class"]),
            unet_class=str(value["unet_class"]),
            recipe=Recipe.from_json(value["recipe"]),
            scheme=Scheme.from_json(value["scheme"]),
            schedule=_schedule(value["schedule"]),
            sampler=Sampler.from_json(value["sampler"]),
            scheduler_config=value["scheduler_config"],
            calibration=value["calibration"],
            float32_weight_bytes=int(value["float32_weight_bytes"]),
            files={path: FileRecord(**record) for path, record in value["files"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise ArtifactCorrupt(
            f"{file} is not a readable manifest: {error}; it was not written by errata"
        ) from error


def _schedule(value: Any) -> CacheSchedule:
    schedule = CacheSchedule.from_json(value)
    if (written := schedule.to_json()) != value:
        raise ValueError(f"its schedule would be written as {written}")
    return schedule
