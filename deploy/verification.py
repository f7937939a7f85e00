"""`verify`: everything in an artifact is what its manifest says, and nothing else is there."""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errata.calibration.plain_json import from_plain
from errata.canonical_json import file_digest, loads_strict
from errata.compress.network.unet import float_layer
from errata.deploy.allowed import component_class
from errata.deploy.components import check_component
from errata.deploy.composition import check_composition
from errata.deploy.consistency import MODEL_INDEX, SCHEDULER_CONFIG, check_consistency
from errata.deploy.manifest import MANIFEST_FILE, FileRecord, Manifest, read_manifest
from errata.deploy.packing import has_code_out_of_range
from errata.deploy.tensors import TensorType, expected_tensors
from errata.errors import ArtifactCorrupt, ArtifactError, ArtifactVersionError

DENOISER_FILE = "unet/errata.safetensors"
_UNET_CONFIG = "unet/config.json"
# Denoisers that an artifact may name, and where they are; a name is never resolved by import path.
_UNETS = {
    "AudioLDM2UNet2DConditionModel": "audioldm2",
    "UNet2DConditionModel": "diffusers",
    "UNet2DModel": "diffusers",
}
_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8,
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip


def verify(path: str | Path) -> Manifest:
    """Checks an artifact from its manifest down to every value, and returns the manifest.

    Checked are the manifest's own digest; that exactly the listed files are there, as plain files, with
    their digests; that scheme, schedule and sampler are those that the recipe means for this network; that
    the pipeline and its components are of classes that an artifact may name, without pickles, programs or
    references elsewhere; that the denoiser file holds exactly the tensors of the scheme, so that no float
    weight of a quantized layer is inside; that codes are in range, scales positive, and float parameters
    finite. The directory must not change meanwhile, nor until `load` has returned.

    Raises:
        ArtifactError: there is no artifact at `path`, or it cannot be read.
        ArtifactVersionError: another format version, or a denoiser class that this version does not know.
        ArtifactCorrupt: a file or tensor is missing, extra or altered.
    """
    root = Path(path)
    if not root.is_dir():
        raise ArtifactError(
            f"{root} is not a directory; give the path of an artifact made by `errata deploy`"
        )
    try:
        manifest = read_manifest(root)
        _check_files(root, manifest)
        unet = empty_unet(root, manifest)
        check_consistency(root, unet, manifest)
        composition = check_composition(root, manifest)
        for name, entry in composition.components.items():
            if entry is not None:
                check_component(root / name)
        _check_tensors(root / DENOISER_FILE, unet, manifest)
    except SafetensorError as error:
        raise ArtifactCorrupt(f"{root / DENOISER_FILE} is not a safetensors file: {error}") from error
    except OSError as error:
        raise ArtifactError(
            f"cannot read {error.filename or root}: {error.strerror}; make it readable"
        ) from error
    return manifest


def empty_unet(root: Path, manifest: Manifest) -> nn.Module:
    """The float network of the artifact on the meta device: shapes, no memory."""
    if manifest.unet_class not in _UNETS:
        raise ArtifactVersionError(
            f"{root} needs denoiser class {manifest.unet_class!r}; this version runs {sorted(_UNETS)}"
        )
    unet_class = component_class(_UNETS[manifest.unet_class], manifest.unet_class)
    try:
        config = loads_strict((root / _UNET_CONFIG).read_bytes())
        if not isinstance(config, dict):  # diffusers would take a text for a path or a hub name, and fetch it
            raise TypeError(f"a {type(config).__name__}, not an object")
        with torch.device("meta"):
            unet: nn.Module = unet_class.from_config(from_plain(config))
        for layer in manifest.scheme.layers:
            float_layer(unet, layer.name)
    except Exception as error:
        raise ArtifactCorrupt(f"{root / _UNET_CONFIG} does not describe the denoiser: {error!r}") from error
    return unet


def _check_files(root: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or pure.as_posix() != name or "\\" in name:
            raise ArtifactCorrupt(f"{root / MANIFEST_FILE} names a file outside the artifact: {name!r}")
    for folder in root.rglob("*"):
        if _is_directory(folder) and not any(folder.iterdir()):
            raise ArtifactCorrupt(f"{folder} is an empty directory; remove it or copy the artifact again")
    present = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if not _is_directory(path)}
    present.pop(MANIFEST_FILE, None)
    for name, path in present.items():
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ArtifactCorrupt(f"{path} is a link or special file; an artifact holds plain files only")
        if name not in manifest.files:
            raise ArtifactCorrupt(
                f"{path} is not listed in the manifest; remove it or copy the artifact again"
            )
    for name, record in manifest.files.items():
        if name not in present:
            raise ArtifactCorrupt(f"{root / name} is missing; copy the artifact again")
        _check_file(root / name, record)
    for name in (DENOISER_FILE, _UNET_CONFIG, MODEL_INDEX, SCHEDULER_CONFIG):
        if name not in manifest.files:
            raise ArtifactCorrupt(f"{root} has no {name}; every artifact needs it")


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _check_file(path: Path, record: FileRecord) -> None:
    size = path.stat().st_size
    if size != record.bytes:
        raise ArtifactCorrupt(f"{path} has {size:,} bytes, the manifest says {record.bytes:,}; copy it again")
    if file_digest(path) != record.sha256:
        raise ArtifactCorrupt(
            f"{path} was altered: its SHA-256 is not the manifest's; copy the artifact again"
        )


def _check_tensors(path: Path, unet: nn.Module, manifest: Manifest) -> None:
    expected = expected_tensors(unet, manifest.scheme, num_steps=manifest.schedule.num_steps)
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        _check_names(path, names, set(expected))
        for name in sorted(names):
            view = file.get_slice(name)
            found = (_DTYPES.get(view.get_dtype()), tuple(view.get_shape()))
            _check_type(path, name, found, expected[name], manifest)
            _check_values(path, name, file.get_tensor(name))


def _check_names(path: Path, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise ArtifactCorrupt(f"{path} lacks {len(missing)} tensors, the first is {missing[0]!r}")
    if extra := sorted(found - expected):
        raise ArtifactCorrupt(
            f"{path} holds {len(extra)} tensors outside the scheme, the first is {extra[0]!r}"
        )


def _check_type(
    path: Path,
    name: str,
    found: tuple[torch.dtype | None, tuple[int, ...]],
    expected: TensorType,
    manifest: Manifest,
) -> None:
    dtype, shape = found
    # A cache-only recipe keeps the weights' floating type; beside quantized layers there is float32 only.
    is_open = not manifest.is_quantized and dtype is not None and dtype.is_floating_point
    same_type = is_open or dtype == expected[0]
    if not same_type or shape != expected[1]:
        raise ArtifactCorrupt(
            f"{path}: tensor {name!r} is {dtype} {shape}, the scheme {manifest.recipe.name} says "
            f"{expected[0]} {expected[1]}"
        )


def _check_values(path: Path, name: str, value: Tensor) -> None:
    if name.endswith(".codes") and has_code_out_of_range(value):
        raise ArtifactCorrupt(f"{path}: tensor {name!r} holds a code outside the symmetric range")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ArtifactCorrupt(f"{path}: tensor {name!r} holds NaN or infinity")
    if name.endswith((".scale", ".weight_scale")) and not bool((value > 0).all()):
        raise ArtifactCorrupt(f"{path}: tensor {name!r} holds a scale that is not positive")
