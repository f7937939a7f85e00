"""The full check of an artifact's contents, and the network that it makes; with diffusers."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from errata.deploy.allowlist import component_class
from errata.deploy.component_check import check_fit
from errata.deploy.component_files import check_component, network_settings
from errata.deploy.composition import DENOISER, check_composition
from errata.deploy.consistency import MODEL_INDEX, SCHEDULER_CONFIG, UNET_CONFIG, check_consistency
from errata.deploy.construction import check_geometry, without_memory
from errata.deploy.manifest import Manifest
from errata.deploy.sharding import denoiser_files
from errata.deploy.tensor_check import check_denoiser
from errata.errors import ArtifactCorruptError, ArtifactVersionError
from errata.runtime.layers import float_layer

# Denoisers that an artifact may name, and where they are; a name is never resolved by import path.
_UNETS = {
    "AudioLDM2UNet2DConditionModel": "audioldm2",
    "UNet2DConditionModel": "diffusers",
    "UNet2DModel": "diffusers",
}


def check_contents(root: Path, manifest: Manifest) -> None:
    """Check that what the digests say is unaltered is also what an artifact may hold.

    Raises:
        ArtifactVersionError, ArtifactCorruptError, ArtifactError: as `errata.deploy.verify`.
    """
    tensor_files = denoiser_files(root, manifest)
    for name in (UNET_CONFIG, MODEL_INDEX, SCHEDULER_CONFIG):
        if name not in manifest.files:
            raise ArtifactCorruptError(f"{root} has no {name}; every artifact needs it")
    unet = empty_unet(root, manifest)
    check_consistency(root, unet, manifest)
    for name, entry in check_composition(root, manifest).components.items():
        if entry is not None:
            check_component(root / name)
            if name != DENOISER:  # whose weights are in a format of their own
                check_fit(root / name, component_class(*entry))
    try:
        check_denoiser(tensor_files, unet, manifest)
    except SafetensorError as error:
        raise ArtifactCorruptError(f"{tensor_files[0].parent} holds no valid safetensors: {error}") from error


def empty_unet(root: Path, manifest: Manifest) -> nn.Module:
    """Return the float network of the artifact on the meta device: shapes, no memory."""
    if manifest.unet_class not in _UNETS:
        raise ArtifactVersionError(
            f"{root} needs denoiser class {manifest.unet_class[:80]!r}; this version runs {sorted(_UNETS)}"
        )
    unet_class = component_class(_UNETS[manifest.unet_class], manifest.unet_class)
    file = root / UNET_CONFIG
    settings = network_settings(file)
    try:
        with without_memory():
            unet: nn.Module = unet_class.from_config(settings)
        for layer in manifest.scheme.layers:
            float_layer(unet, layer.name)
    except Exception as error:  # diffusers raises errors of any class
        raise ArtifactCorruptError(f"{file} does not describe the denoiser: {repr(error)[:500]}") from error
    check_geometry(file, unet, settings)
    return unet
