"""`deploy`: a compressed pipeline becomes a frozen artifact without the float weights of quantized layers."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import DiffusionPipeline

import errata
from errata.canonical_json import file_digest
from errata.deploy.allowlist import entry_of, is_pipeline
from errata.deploy.components import write_component, write_json
from errata.deploy.composition import DENOISER, MODEL_INDEX
from errata.deploy.manifest import MANIFEST_FILE, FileRecord, Manifest
from errata.deploy.sharding import MAX_SHARD_SIZE, size_in_bytes, write_tensors
from errata.deploy.tensors import stored_tensors
from errata.deploy.verification import verify
from errata.directories import staged_directory
from errata.errors import ArtifactError
from errata.fingerprint import public_config

if TYPE_CHECKING:
    from errata.compress import CompressedPipeline


def deploy(
    compressed: CompressedPipeline, out: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> Path:
    """Write the artifact directory `out`, verify it, and return its path.

    The same input gives the same bytes on the same machine, versions and thread count.

    Args:
        compressed: what to freeze.
        out: a new directory.
        max_shard_size: where the denoiser's tensors take more than this, in bytes or as a text such as
            `"5GB"`, they are written to several files of at most so much each. Other components stay whole.

    Raises:
        TypeError: not a `CompressedPipeline`.
        ArtifactError: `out` exists or cannot be written, `max_shard_size` is not a size, or a class or
            component of the pipeline is not one that an artifact may hold.
    """
    from errata.compress import CompressedPipeline  # brings in brevitas, which no artifact needs

    if not isinstance(compressed, CompressedPipeline):
        raise TypeError(
            f"deploy takes a CompressedPipeline, got {type(compressed).__name__}; "
            "make one with errata.compress.compress(…) or open one with errata.compress.load(path)"
        )
    shard_bytes = size_in_bytes(max_shard_size)
    pipe = compressed.float_pipe
    _check_pipeline(pipe)
    with staged_directory(Path(out), error=ArtifactError) as staging:
        _write_components(compressed, staging)
        _write_denoiser(compressed, staging, shard_bytes)
        _manifest(compressed, staging).write(staging)
        verify(staging)
    return Path(out)


def export(
    compressed: CompressedPipeline, out: str | Path, *, max_shard_size: int | str = MAX_SHARD_SIZE
) -> Path:
    """Older name of `deploy`."""
    return deploy(compressed, out, max_shard_size=max_shard_size)


def export_onnx(
    artifact: str | Path,
    out: str | Path,
    *,
    form: str = "gathered",
    example: Mapping[str, Any] | None = None,
) -> Path:
    """Write the engine directory `out` of an artifact, and return its path; see `engines.export_onnx`.

    Raises:
        ArtifactError: as there.
    """
    from errata.deploy.engines.exporting import export_onnx as export_engine  # its modules take a second

    return export_engine(artifact, out, form=form, example=example)


def _check_pipeline(pipe: DiffusionPipeline) -> None:
    """Check that a loader may name everything in the pipeline, before anything is written."""
    if not is_pipeline(type(pipe)):
        raise ArtifactError(
            f"{type(pipe).__module__}.{type(pipe).__name__} is not a pipeline of diffusers or errata, "
            "and an artifact can name no other; use the class that it is derived from"
        )
    for component in pipe.components.values():
        if component is not None:
            entry_of(component)


def _write_components(compressed: CompressedPipeline, root: Path) -> None:
    pipe = compressed.float_pipe
    index: dict[str, object] = {
        "_class_name": type(pipe).__name__,
        "_diffusers_version": diffusers.__version__,
    }
    for name in inspect.signature(type(pipe).__init__).parameters.keys() - {"self"}:
        if name not in pipe.components:
            if name in pipe.config:  # a setting, as `requires_safety_checker`, that the pipeline remembers
                index[name] = pipe.config[name]
            continue
        component = pipe.components[name]
        index[name] = [None, None] if component is None else list(entry_of(component))
        if component is not None and name != DENOISER:
            write_component(component, root / name)
    write_json(root / MODEL_INDEX, index)


def _write_denoiser(compressed: CompressedPipeline, root: Path, max_shard_size: int) -> None:
    unet = compressed.float_pipe.unet
    (root / "unet").mkdir()
    # Without diffusers' private notes: one of them is a list in the order of a set, another in every process.
    config = {"_class_name": type(unet).__name__, "_diffusers_version": diffusers.__version__}
    write_json(root / "unet" / "config.json", {**config, **public_config(unet.config)})
    compression = compressed.compression
    tensors = stored_tensors(unet, compression.scheme, compression.table)
    write_tensors(tensors, root, max_shard_size=max_shard_size)


def _manifest(compressed: CompressedPipeline, root: Path) -> Manifest:
    pipe, compression = compressed.float_pipe, compressed.compression
    parameters = sum(value.numel() for value in pipe.unet.state_dict().values())
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    return Manifest(
        made_by=_versions(pipe),
        pipeline_class=type(pipe).__name__,
        unet_class=type(pipe.unet).__name__,
        recipe=compression.recipe,
        scheme=compression.scheme,
        schedule=compression.schedule,
        sampler=compression.sampler,
        scheduler_config=json.loads((root / "scheduler" / "scheduler_config.json").read_text()),
        calibration=compression.calibration,
        calibrated_output=compression.calibrated_output,
        float32_weight_bytes=4 * parameters,
        files={
            path.relative_to(root).as_posix(): FileRecord(bytes=path.stat().st_size, sha256=file_digest(path))
            for path in files
        },
    )


def _versions(pipe: DiffusionPipeline) -> dict[str, str]:
    versions = {
        "errata": errata.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    libraries = {type(component).__module__.split(".")[0] for component in pipe.components.values()}
    return versions | ({"transformers": version("transformers")} if "transformers" in libraries else {})
