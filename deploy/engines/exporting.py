"""`export_onnx`: an artifact becomes an engine directory, compared with the artifact's reference backend."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import errata
from errata.canonical_json import file_digest
from errata.deploy.assembly import load_artifact, restore_buffers
from errata.deploy.engines.agreement import check_agreement
from errata.deploy.engines.graph_check import LARGEST_GRAPH, graph_spec
from errata.deploy.engines.loading import make_denoiser
from errata.deploy.engines.manifest import FORMS, EngineManifest
from errata.deploy.engines.onnx_graphs import (
    CACHED,
    FULL,
    EngineOutputMap,
    install_engine_layers,
    write_graphs,
)
from errata.deploy.engines.runtime import needed
from errata.deploy.engines.verification import FEATURE_FILE, verify
from errata.deploy.full_check import empty_unet
from errata.deploy.manifest import FileRecord, Manifest
from errata.deploy.pipeline import DeployedPipeline
from errata.deploy.sharding import is_denoiser_file, read_tensors
from errata.deploy.tensor_check import float_parameters
from errata.directories import check_is_vacant, staged_directory
from errata.errors import ArtifactError, first_line
from errata.runtime.denoiser import Conditioning
from errata.runtime.feature_correction import FEATURE as FEATURE_TABLES
from errata.runtime.schedule import CacheSchedule, StepKind
from errata.runtime.step_context import StepContext
from errata.runtime.unet import BranchedUNet

# More than one tells what is there once from what is there for each sample; four have a median.
_SAMPLES = 4


def export_onnx(
    artifact: str | Path,
    out: str | Path,
    *,
    form: str = "gathered",
    example: Mapping[str, Any] | None = None,
) -> Path:
    """Write the engine directory `out` of an artifact, and return its path.

    Before the directory is there, the engine is compared with the artifact's reference backend at the first,
    middle and last step, in full and cached, see `agreement.check_agreement`. Height, width and lengths are
    those of the call that the inputs are taken from; the number of samples is free.

    Args:
        artifact: directory made by `deploy.deploy`.
        out: a new directory.
        form: "gathered" gathers the scales of a step from tables, and onnxruntime multiplies in int8; "qdq"
            has quantize/dequantize pairs of constant scales, of which OpenVINO and TensorRT build int8
            kernels, and which onnxruntime computes in floating point.
        example: arguments of a call of the pipeline, whose first denoiser call says which inputs the graphs
            have; None calls it for four samples, with a prompt or labels where it takes them.

    Raises:
        ArtifactError: and its subclasses as in `deploy.verify`; `out` exists or cannot be written; the
            network cannot be exported, or the engine does not agree with it; onnx or onnxruntime is missing.
    """
    if form not in FORMS:
        raise ArtifactError(f"unknown form {form!r}; allowed are {' and '.join(FORMS)}")
    for package in ("onnx", "onnxruntime"):
        needed(package)
    root, target = Path(artifact), Path(out)
    check_is_vacant(target, error=ArtifactError)
    deployed = load_artifact(root, device="cpu", backend="reference")  # verified
    manifest = deployed.manifest
    tensors = read_tensors(root, manifest)
    _check_full_precision(tensors)
    sample, cond = example_inputs(deployed, example)
    with staged_directory(target, error=ArtifactError) as staging:
        _copy_shared(root, manifest, staging)
        _write_feature_tables(manifest, tensors, staging)
        _write_graphs(root, manifest, tensors, sample, cond, staging, form=form)
        _engine_manifest(manifest, staging, form).write(staging)
        engine = make_denoiser(staging, verify(staging))
        check_agreement(engine, deployed, sample, cond, form=form)
    return target


def _check_full_precision(tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and value.dtype is not torch.float32:
            raise ArtifactError(
                f"the artifact stores {name!r} in {value.dtype}, and an ONNX engine on the CPU computes in "
                "float32; compress the pipeline in float32 and export that"
            )


def _copy_shared(root: Path, manifest: Manifest, staging: Path) -> None:
    for name in manifest.files:
        if not is_denoiser_file(name):
            (staging / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(root / name, staging / name)


def _write_feature_tables(manifest: Manifest, tensors: Mapping[str, Tensor], staging: Path) -> None:
    if manifest.scheme.correction is not None:
        save_file({name: tensors[name] for name in FEATURE_TABLES}, staging / FEATURE_FILE)


def _write_graphs(
    root: Path,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    sample: Tensor,
    cond: Mapping[str, Tensor],
    staging: Path,
    *,
    form: str,
) -> None:
    unet, context = empty_unet(root, manifest), StepContext()
    parameters = {name: tensors[name] for name in float_parameters(unet, manifest.scheme)}
    install_engine_layers(unet, manifest.scheme, tensors, context, form=form)
    unet.load_state_dict(parameters, strict=False, assign=True)
    restore_buffers(unet)
    size = sum(value.nbytes for value in unet.state_dict().values())
    if size > LARGEST_GRAPH:
        raise ArtifactError(
            f"the network takes {size:,} bytes as a graph; one ONNX file holds at most {LARGEST_GRAPH:,}"
        )
    network = BranchedUNet(unet.eval().requires_grad_(False))
    try:
        output = EngineOutputMap.of(manifest.scheme, tensors)
        write_graphs(network, context, manifest, sample, cond, staging, output=output)
    except (RuntimeError, TypeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        first = first_line(error)
        raise ArtifactError(
            f"{manifest.unet_class} cannot be written as ONNX by torch {torch.__version__}: {first[:300]}; "
            "deploy it without an engine"
        ) from error


def _engine_manifest(manifest: Manifest, staging: Path, form: str) -> EngineManifest:
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    versions = {"errata": errata.__version__, "torch": torch.__version__}
    versions |= {name: needed(name).__version__ for name in ("onnx", "onnxruntime")}
    try:
        graphs = {name: graph_spec(staging / name) for name in (FULL, CACHED) if (staging / name).exists()}
    except ValueError as error:
        raise ArtifactError(f"the graph has an input that an engine cannot have: {error}") from error
    return EngineManifest.of(
        manifest,
        form=form,
        made_by=versions,
        graphs=graphs,
        files={
            path.relative_to(staging).as_posix(): FileRecord(
                bytes=path.stat().st_size, sha256=file_digest(path)
            )
            for path in files
        },
    )


class _SeenError(Exception):
    """Ends the run at its first call."""


class _Spy:
    """A `Denoiser` that keeps what it is given and evaluates nothing."""

    def __init__(self, schedule: CacheSchedule, timesteps: tuple[float, ...]) -> None:
        self.schedule = schedule
        self.timesteps = timesteps
        self.given: tuple[Tensor, Conditioning] | None = None

    def full(self, x: Tensor, step: int, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        self.given = (x, cond)
        raise _SeenError

    def cached(
        self, x: Tensor, step: int, cond: Conditioning, feature: Tensor, *, is_extrapolated: bool = False
    ) -> Tensor:
        raise _SeenError

    def cost(self, kind: StepKind, *, batch_size: int | None = None) -> float:
        raise _SeenError


def example_inputs(
    deployed: DeployedPipeline, example: Mapping[str, Any] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sample and conditions of the first denoiser call of a run, floating ones as float32.

    Args:
        deployed: the artifact.
        example: arguments of a call of the pipeline; None finds some that draw four samples.

    Raises:
        ArtifactError: the pipeline refuses them, or needs some that cannot be guessed.
    """
    spy = _Spy(deployed.schedule, deployed.denoiser.timesteps)
    arguments = _guessed(deployed.pipe) if example is None else dict(example)
    arguments.setdefault("generator", torch.Generator().manual_seed(0))
    deployed.pipe.set_progress_bar_config(disable=True)
    run = deployed.start(denoiser=spy)
    try:
        run.pipe(**deployed.arguments(arguments))
    except _SeenError:
        pass
    except Exception as error:  # diffusers raises errors of any class
        first = first_line(error)
        raise ArtifactError(
            f"{type(deployed.pipe).__name__} refuses the call {sorted(arguments)} from which the inputs of "
            f"the graphs are taken: {first}; pass other arguments as `example`"
        ) from error
    assert spy.given is not None  # every pipeline calls its denoiser, or raises
    sample, cond = spy.given
    return sample.float(), {name: _single(value) for name, value in cond.items()}


def _guessed(pipe: Any) -> dict[str, Any]:
    takes = inspect.signature(type(pipe).__call__).parameters
    if "image" in takes:
        raise ArtifactError(
            f"{type(pipe).__name__} needs an image: in Python, pass the arguments of a call as `example`, "
            "with an image of the size that it will be used for"
        )
    arguments: dict[str, Any] = {}
    if "prompt" in takes:
        arguments["prompt"] = ["a photo"] * _SAMPLES
    if getattr(pipe, "num_labels", 0):
        arguments["class_labels"] = [0] * _SAMPLES
    elif "batch_size" in takes:
        arguments["batch_size"] = _SAMPLES
    return arguments


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
