"""A verified artifact's parts become a pipeline: network, kernels, and the components around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from errata.deploy import reference as _reference
from errata.deploy.allowlist import component_class
from errata.deploy.components import load_component
from errata.deploy.composition import DENOISER, SCHEDULER, check_composition
from errata.deploy.cpu import kernels as _cpu
from errata.deploy.cpu.planned_unet import PlannedUNet
from errata.deploy.cuda import installing as _cuda
from errata.deploy.full_check import check_contents, empty_unet
from errata.deploy.kernel_registry import (
    AttentionRequest,
    BackendRow,
    LayerRequest,
    check_backend,
    choose_attention_kernel,
    choose_layer_kernel,
    layer_kernels,
)
from errata.deploy.manifest import Manifest
from errata.deploy.pipeline import DeployedPipeline, OnMismatch
from errata.deploy.sharding import read_tensors
from errata.deploy.tensor_check import float_parameters
from errata.deploy.verification import verify_by
from errata.errors import ArtifactCorruptError, ArtifactError, first_line
from errata.runtime.attention import QuantizedAttention
from errata.runtime.denoiser import UNetDenoiser
from errata.runtime.feature_correction import FeatureCorrection, correct_outputs
from errata.runtime.output_map import OutputMap
from errata.runtime.replacement import replace_layers
from errata.runtime.scheme import AttentionScheme, LayerScheme, Scheme
from errata.runtime.step_context import StepContext
from errata.runtime.stepped_unet import SteppedUNet
from errata.runtime.unet import BranchedUNet

# Importing them registers the kernels that errata brings.
OUR_KERNELS = (_reference, _cpu, _cuda)


def load_artifact(
    path: str | Path,
    device: str | torch.device | None = None,
    backend: str = "auto",
    on_mismatch: OnMismatch = "error",
) -> DeployedPipeline:
    """Verify the artifact at `path` and load it; arguments and errors are those of `errata.deploy.load`."""
    if on_mismatch not in get_args(OnMismatch):
        raise ArtifactError(f"unknown on_mismatch {on_mismatch!r}; allowed are 'error' and 'nearest'")
    chosen = _device(device)
    check_backend(backend, chosen)
    root = Path(path)
    manifest = verify_by(check_contents, root)
    unet, context = empty_unet(root, manifest), StepContext()
    tensors = _without_mapping(read_tensors(root, manifest), manifest)
    kept = tuple(float_parameters(unet, manifest.scheme))
    report = install(unet, manifest.scheme, tensors, context=context, backend=backend, device=chosen)
    parameters = {name: tensors[name] for name in kept}
    unexpected = unet.load_state_dict(parameters, strict=False, assign=True).unexpected_keys
    assert not unexpected  # `verify` has compared the names; what is missing are the layers installed above
    restore_buffers(unet)
    branched = BranchedUNet(unet.eval().requires_grad_(False).to(chosen))
    if chosen.type == "cpu" and any(row.backend == _cpu.VNNI.name for row in report):
        branched = PlannedUNet(branched, context)
    finish(unet, report, context)
    correction = FeatureCorrection.of(manifest.scheme, tensors)
    denoiser = UNetDenoiser(
        branched,
        context,
        manifest.schedule,
        manifest.sampler.timesteps,
        correction=correction,
        output_map=OutputMap.of(manifest.scheme, tensors),
    )
    pipe = assembled(root, manifest, SteppedUNet(denoiser, unet.config, module=branched), chosen)
    steps = manifest.sampler.num_inference_steps
    return DeployedPipeline(
        pipe, num_inference_steps=steps, manifest=manifest, report=report, on_mismatch=on_mismatch
    )


def _without_mapping(tensors: dict[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    """Copy all but codes: kernels drop the codes, and one small tensor would keep the file in memory."""
    if not manifest.is_quantized:
        return tensors
    return {name: value if name.endswith(".codes") else value.clone() for name, value in tensors.items()}


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = "'cpu', 'cuda'" if torch.cuda.is_available() else "'cpu' (there is no CUDA here)"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ArtifactError(f"device {str(device)!r} cannot be used; allowed are {allowed}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ArtifactError(f"device {str(device)!r} is not supported; allowed are {allowed}")
    return chosen


def assembled(root: Path, manifest: Manifest, unet: SteppedUNet, device: torch.device) -> DiffusionPipeline:
    """Return the diffusers pipeline of a verified artifact around its denoiser.

    Raises:
        ArtifactCorruptError: its components do not make one.
    """
    composition = check_composition(root, manifest)
    name = composition.pipeline.__name__
    components: dict[str, Any] = {DENOISER: unet}
    try:
        for component, entry in composition.components.items():
            if component not in components:
                kind = None if entry is None else component_class(*entry)
                components[component] = None if kind is None else load_component(root / component, kind)
        # `from_pretrained` would look for a UNet of diffusers' own.
        pipe = composition.pipeline(**components, **composition.settings)
    except Exception as error:  # diffusers and transformers raise errors of any class
        reason = first_line(error)
        raise ArtifactCorruptError(f"{root} does not make a {name}: {reason}; deploy again") from error
    # DDIMPipeline turns any scheduler into a DDIMScheduler.
    pipe.register_modules(scheduler=components[SCHEDULER])
    # Everything is on the CPU already, and diffusers warns of half precision there at every move.
    return pipe if device.type == "cpu" else pipe.to(device)


def restore_buffers(unet: nn.Module) -> None:
    """Restore buffers that no file holds: they follow from the configuration (the K-blocks' blur kernels)."""
    stored = set(unet.state_dict())
    if all(not value.is_meta or name in stored for name, value in unet.named_buffers()):
        return
    with torch.random.fork_rng(devices=[]):
        made = dict(type(unet).from_config(unet.config).named_buffers())  # type: ignore[attr-defined]
    for name, value in list(unet.named_buffers()):
        if value.is_meta and name not in stored:
            owner, _, leaf = name.rpartition(".")
            unet.get_submodule(owner)._buffers[leaf] = made[name]


def install(
    unet: nn.Module,
    scheme: Scheme,
    tensors: Mapping[str, Tensor],
    *,
    context: StepContext,
    backend: str,
    device: torch.device,
) -> list[BackendRow]:
    """Put runtime layers into `unet` (in place) for its float ones; return the report.

    Call `finish` when the network has its other parameters, too.
    """
    rows: list[BackendRow] = []

    def layer(described: LayerScheme, module: nn.Conv2d | nn.Linear) -> nn.Module:
        request = LayerRequest(
            scheme=described, module=module, tensors=tensors, context=context, device=device, backend=backend
        )
        kernel, reason = choose_layer_kernel(request)
        rows.append(_row(described.name, described.kind, described.label(), kernel.name, reason))
        return kernel.build(request)

    def attention(products: AttentionScheme) -> QuantizedAttention:
        request = AttentionRequest(
            scheme=products, tensors=tensors, context=context, device=device, backend=backend
        )
        kernel, reason = choose_attention_kernel(request)
        name = f"{products.name} (matmuls)"
        rows.append(_row(name, "attention", f"a{products.bits}", kernel.name, reason))
        return kernel.build(request)

    replace_layers(unet, scheme, layer=layer, attention=attention)
    corrected = correct_outputs(unet, scheme, tensors, context=context, device=device)
    return [
        replace(row, reason=f"{row.reason}; output corrected in cached calls")
        if row.layer in corrected
        else row
        for row in rows
    ]


def finish(unet: nn.Module, rows: list[BackendRow], context: StepContext) -> None:
    """Let the kernels in use finish a network whose layers are all in place: in `unet` and `rows` itself."""
    used = {row.backend for row in rows}
    finishers = [kernel.finish for kernel in layer_kernels() if kernel.name in used and kernel.finish]
    for finisher in dict.fromkeys(finishers):
        finisher(unet, rows, context)


def _row(layer: str, kind: str, scheme: str, backend: str, reason: str) -> BackendRow:
    return BackendRow(layer=layer, kind=kind, scheme=scheme, backend=backend, reason=reason)
