"""`load`: a verified engine directory becomes a pipeline that samples and can be corrected."""

from __future__ import annotations

from pathlib import Path

import torch

from errata.deploy.backends import BackendRow
from errata.deploy.engines.denoiser import EngineDenoiser
from errata.deploy.engines.manifest import EngineManifest
from errata.deploy.engines.onnx_graphs import CACHED, FULL
from errata.deploy.engines.session import Session
from errata.deploy.engines.verification import as_artifact, feature_tables, float_network, verify
from errata.deploy.pipeline import DeployedPipeline, assembled
from errata.runtime.feature_correction import FeatureCorrection
from errata.runtime.schedule import StepKind
from errata.runtime.stepped_unet import SteppedUNet

_FILES: dict[StepKind, str] = {"full": FULL, "cached": CACHED}


def load(path: str | Path) -> DeployedPipeline:
    """Verifies the engine directory at `path` and loads it; it runs on the CPU.

    The pipeline is called and corrected like that of an artifact. It takes samples and conditions of the
    sizes that it was exported for, in any number. Other numbers of sampling steps cannot be mapped to it.

    Raises:
        ArtifactError: and its subclasses as in `verify`; or onnxruntime is not installed.
    """
    root = Path(path)
    manifest = verify(root)
    network = float_network(root, manifest)
    unet = SteppedUNet(make_denoiser(root, manifest), network.config, stands_for=type(network))
    return DeployedPipeline(
        assembled(root, as_artifact(manifest), unet, torch.device("cpu")),
        num_inference_steps=manifest.sampler.num_inference_steps,
        manifest=manifest,
        report=_report(manifest),
    )


def make_denoiser(root: Path, manifest: EngineManifest) -> EngineDenoiser:
    """What the graphs of a verified engine evaluate.

    Raises:
        ArtifactError: onnxruntime cannot run them, or is not installed.
    """
    graphs = {
        kind: Session(root / file, manifest.graphs[file])
        for kind, file in _FILES.items()
        if file in manifest.graphs
    }
    correction = FeatureCorrection.of(manifest.scheme, feature_tables(root, manifest))
    return EngineDenoiser(graphs, manifest.schedule, manifest.sampler.timesteps, correction=correction)


def _report(manifest: EngineManifest) -> list[BackendRow]:
    scheme = manifest.scheme
    corrected = {layer.name for layer in scheme.correction.layers} if scheme.correction is not None else set()
    rows = []
    for layer in scheme.layers:
        backend, reason = _kernel(manifest.form, is_quantized=layer.activation_bits is not None)
        if layer.weight_bits == 4:
            reason += "; int4 weights were unpacked to int8 at export"
        if layer.name in corrected:
            reason += "; output corrected in cached calls"
        rows.append(
            BackendRow(
                layer=layer.name, kind=layer.kind, scheme=layer.label(), backend=backend, reason=reason
            )
        )
    backend, reason = _kernel(manifest.form, is_quantized=True)
    return rows + [
        BackendRow(
            layer=f"{attention.name} (matmuls)",
            kind="attention",
            scheme=f"a{attention.bits}",
            backend=backend,
            reason=reason,
        )
        for attention in scheme.attentions
    ]


def _kernel(form: str, *, is_quantized: bool) -> tuple[str, str]:
    if not is_quantized:
        return "onnxruntime float", "weights dequantized at each call, float product"
    if form == "qdq":
        return "onnxruntime float", "inputs on the 8-bit grid, float product; int8 in OpenVINO and TensorRT"
    return "onnxruntime int8", "int8 product"
