"""`verify`: checks an engine directory before anything of it is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from errata.deploy.allowlist import component_class
from errata.deploy.component_check import check_fit
from errata.deploy.component_files import check_component
from errata.deploy.composition import DENOISER, MODEL_INDEX, check_composition
from errata.deploy.consistency import SCHEDULER_CONFIG, UNET_CONFIG, check_consistency
from errata.deploy.engines.graph_check import check_graph
from errata.deploy.engines.manifest import ENGINE_FILE, EngineManifest, TensorSpec, read_engine_manifest
from errata.deploy.engines.onnx_graphs import CACHED, FEATURE, FULL, PREDICTION, SAMPLE, STEP
from errata.deploy.full_check import empty_unet
from errata.deploy.inventory import check_files
from errata.deploy.manifest import Manifest
from errata.deploy.safetensors_header import read_header
from errata.errors import ArtifactCorruptError, ArtifactError
from errata.runtime.feature_correction import FEATURE as FEATURE_TABLES

FEATURE_FILE = "cache.safetensors"


def verify(path: str | Path) -> EngineManifest:
    """Check an engine directory from its manifest down, and return the manifest.

    Checked are the manifest's own digest and that of the artifact's manifest inside; that exactly the listed
    files are there, as plain files, with their digests; that those which an engine shares with its artifact
    are the artifact's own, to the byte, and what an artifact may hold; that the graphs take and give what the
    manifest says, refer to nothing outside, and have no operators but ONNX's own and the one of onnxruntime's
    that errata writes. What a graph computes is not checked: that was done when it was exported, and only a
    signature could tell who did. The directory must not change meanwhile, nor until `load` has returned.

    Raises:
        ArtifactError: there is no engine at `path`, it cannot be read, or onnx is not installed.
        ArtifactVersionError: another format version, or a class that this version does not know.
        ArtifactCorruptError: a file or graph is missing, extra, altered, or not what an engine holds.
    """
    root = Path(path)
    if not root.is_dir():
        raise ArtifactError(
            f"{root} is not a directory; give the path of an engine made by `errata export-onnx`"
        )
    try:
        manifest = read_engine_manifest(root)
        check_files(root, manifest, manifest_file=ENGINE_FILE)
        _check_listing(root, manifest)
        _check_shared(root, manifest)
        _check_graphs(root, manifest)
        _check_feature_tables(root, manifest.artifact)
    except OSError as error:
        raise ArtifactError(
            f"cannot read {error.filename or root}: {error.strerror}; make it readable"
        ) from error
    return manifest


def as_artifact(manifest: EngineManifest) -> Manifest:
    """Return the artifact's manifest with those files only that the engine has from it."""
    return dataclasses.replace(manifest.artifact, files=manifest.shared_files)


def float_network(root: Path, manifest: EngineManifest) -> nn.Module:
    """Return the float network that the engine stands for, on the meta device: shapes, no memory."""
    return empty_unet(root, manifest.artifact)


def feature_tables(root: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Return the tables of the feature's own correction, as in the artifact; empty without one."""
    return {} if manifest.scheme.correction is None else load_file(root / FEATURE_FILE)


def _check_listing(root: Path, manifest: EngineManifest) -> None:
    """Check that every file is a graph, a table that the scheme asks for, or one of the artifact's."""
    artifact = manifest.artifact
    graphs = {FULL, CACHED} if artifact.schedule.has_cache else {FULL}
    own = graphs | (set() if artifact.scheme.correction is None else {FEATURE_FILE})
    shared = manifest.shared_files
    if set(manifest.graphs) != graphs:
        raise ArtifactCorruptError(
            f"{root / ENGINE_FILE} has the graphs {sorted(manifest.graphs)}, its schedule needs "
            f"{sorted(graphs)}; it was not written by errata"
        )
    if odd := sorted(set(manifest.files) ^ (own | set(shared))):
        trouble = "lists" if odd[0] in manifest.files else "does not list"
        raise ArtifactCorruptError(f"{root / ENGINE_FILE} {trouble} {odd[0]!r}; it was not written by errata")
    for name, record in shared.items():
        if manifest.files[name] != record:
            raise ArtifactCorruptError(
                f"{root / name} is not the file of the artifact that {ENGINE_FILE} names; export again"
            )


def _check_shared(root: Path, manifest: EngineManifest) -> None:
    """Check the files that are the artifact's, with the artifact's own checks."""
    artifact = as_artifact(manifest)
    for name in (UNET_CONFIG, MODEL_INDEX, SCHEDULER_CONFIG):
        if name not in artifact.files:
            raise ArtifactCorruptError(f"{root} has no {name}; every engine needs it")
    check_consistency(root, float_network(root, manifest), artifact)
    for name, entry in check_composition(root, artifact).components.items():
        if entry is not None:
            check_component(root / name)
            if name != DENOISER:  # whose weights are in the graphs
                check_fit(root / name, component_class(*entry))


def _check_graphs(root: Path, manifest: EngineManifest) -> None:
    for name, spec in manifest.graphs.items():
        feature = [FEATURE] if name == CACHED else []
        given = [PREDICTION, FEATURE] if name == FULL and CACHED in manifest.graphs else [PREDICTION]
        needs = [SAMPLE, STEP, *feature]
        found = [end.name for end in spec.inputs]
        if found[: len(needs)] != needs or len(set(found)) != len(found):
            raise _misfit(root, name, f"the inputs {found}; the first are {needs}, each of them once")
        if [end.name for end in spec.outputs] != given:
            raise _misfit(root, name, f"the outputs {[end.name for end in spec.outputs]}, not {given}")
        _check_step(root, name, spec.inputs[1])
        check_graph(root / name, spec)


def _check_step(root: Path, name: str, step: TensorSpec) -> None:
    if (step.dtype, step.shape) != ("int64", ()):
        raise _misfit(root, name, f"a step that is {step.dtype} {list(step.shape)}, not one int64")


def _misfit(root: Path, name: str, trouble: str) -> ArtifactCorruptError:
    return ArtifactCorruptError(
        f"{root / ENGINE_FILE}: {name} has {trouble[:400]}; it was not written by errata"
    )


def _check_feature_tables(root: Path, artifact: Manifest) -> None:
    correction = artifact.scheme.correction
    if correction is None:
        return
    file, shape = root / FEATURE_FILE, (artifact.schedule.num_steps, correction.feature_channels)
    header = read_header(file)
    is_right = all(item.dtype is torch.float32 and item.shape == shape for item in header.tensors.values())
    if set(header.tensors) != set(FEATURE_TABLES) or not is_right or header.metadata:
        raise ArtifactCorruptError(
            f"{file} does not hold exactly {' and '.join(FEATURE_TABLES)}, float32 {list(shape)}; export "
            "again"
        )
    try:
        tables = load_file(file)
    except SafetensorError as error:
        raise ArtifactCorruptError(f"{file} holds no valid safetensors: {error}; export again") from error
    for name, table in tables.items():
        if not bool(torch.isfinite(table).all()):
            raise ArtifactCorruptError(f"{file}: tensor {name!r} holds NaN or infinity; export again")
