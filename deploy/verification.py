"""`verify`: checks that an artifact holds what its manifest says, and nothing else.

`layer_rows` lists what the denoiser of a verified artifact is made of, without loading it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from errata.canonical_json import file_digest
from errata.deploy.allowlist import component_class
from errata.deploy.component_check import check_fit, network_settings
from errata.deploy.components import check_component
from errata.deploy.composition import DENOISER, check_composition
from errata.deploy.consistency import MODEL_INDEX, SCHEDULER_CONFIG, UNET_CONFIG, check_consistency
from errata.deploy.construction import check_geometry, without_memory
from errata.deploy.inventory import check_files
from errata.deploy.manifest import MANIFEST_FILE, Manifest, read_manifest
from errata.deploy.safetensors_header import read_header
from errata.deploy.sharding import DENOISER_FILE, denoiser_files
from errata.deploy.signature_check import check_signature
from errata.deploy.tensors import check_denoiser
from errata.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError
from errata.runtime.layers import float_layer

__all__ = ["DENOISER_FILE", "LayerRow", "empty_unet", "layer_rows", "verify"]

# Denoisers that an artifact may name, and where they are; a name is never resolved by import path.
_UNETS = {
    "AudioLDM2UNet2DConditionModel": "audioldm2",
    "UNet2DConditionModel": "diffusers",
    "UNet2DModel": "diffusers",
}


def verify(
    path: str | Path, *, signature: str | Path | None = None, public_key: str | Path | None = None
) -> Manifest:
    """Check an artifact from its manifest down to every value, and return the manifest.

    Checked are the manifest's own digest; that exactly the listed files are there, as plain files, with
    their digests; that scheme, schedule and sampler are those that the recipe means for this network; that
    the pipeline and its components are of classes that an artifact may name, without pickles, programs or
    references elsewhere; that the denoiser file holds exactly the tensors of the scheme, so that no float
    weight of a quantized layer is inside; that codes are in range, scales positive, and float parameters
    finite. The directory must not change meanwhile, nor until `load` has returned.

    Digests tell damage; only a signature tells who made the artifact. With `signature`, a file that `sign`
    wrote, and `public_key`, its maker's, nothing is read but the manifest until the signature holds.

    Raises:
        ArtifactError: there is no artifact at `path`, or it cannot be read; or the signature was made with
            another key, or cannot be checked here.
        ArtifactVersionError: another format version, or a denoiser class that this version does not know.
        ArtifactCorruptError: a file or tensor is missing, extra or altered; or the signature is damaged, or
            of another artifact.
    """
    if (signature is None) != (public_key is None):
        raise ArtifactError("signature and public_key belong together; give both, or neither")
    root = Path(path)
    if not root.is_dir():
        raise ArtifactError(
            f"{root} is not a directory; give the path of an artifact made by `errata deploy`"
        )
    try:
        manifest = read_manifest(root)
        check_files(root, manifest)
        if signature is not None and public_key is not None:
            digests = {name: record.sha256 for name, record in manifest.files.items()}
            digests[MANIFEST_FILE] = file_digest(root / MANIFEST_FILE)
            check_signature(root, digests, Path(signature), Path(public_key))
        _check_contents(root, manifest)
    except OSError as error:
        raise ArtifactError(
            f"cannot read {error.filename or root}: {error.strerror}; make it readable"
        ) from error
    return manifest


def _check_contents(root: Path, manifest: Manifest) -> None:
    """Check that what the digests say is unaltered is also what an artifact may hold."""
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


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One quantized layer, or the matrix products of one attention.

    Attributes:
        layer: its name in the network.
        kind: `conv2d`, `linear` or `attention`.
        shape: of its weight; empty for an attention.
        weight_bits: None for an attention.
        input_bits: None where the input stays in floating point.
        is_corrected: whether its output is corrected in cached calls.
        bytes: what its tensors take in the file, scales and biases included.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int | None
    input_bits: int | None
    is_corrected: bool
    bytes: int


def layer_rows(root: Path, manifest: Manifest) -> list[LayerRow]:
    """Return a row for each layer of the scheme, then for each attention; the artifact has been verified."""
    scheme = manifest.scheme
    names = [layer.name for layer in scheme.layers] + [attention.name for attention in scheme.attentions]
    sizes = _sizes(denoiser_files(root, manifest), names)
    corrected = {layer.name for layer in scheme.correction.layers} if scheme.correction else set()
    unet = empty_unet(root, manifest)
    rows = [
        LayerRow(
            layer=layer.name,
            kind=layer.kind,
            shape=tuple(float_layer(unet, layer.name).weight.shape),
            weight_bits=layer.weight_bits,
            input_bits=layer.activation_bits,
            is_corrected=layer.name in corrected,
            bytes=sizes[layer.name],
        )
        for layer in scheme.layers
    ]
    return rows + [
        LayerRow(
            layer=attention.name,
            kind="attention",
            shape=(),
            weight_bits=None,
            input_bits=attention.bits,
            is_corrected=False,
            bytes=sizes[attention.name],
        )
        for attention in scheme.attentions
    ]


def _sizes(files: Iterable[Path], modules: Iterable[str]) -> Counter[str]:
    """Return the bytes of the tensors of each module, those of modules inside it left out."""
    known, sizes = set(modules), Counter[str]()
    for file in files:
        for name, tensor in read_header(file).tensors.items():
            owner = name
            while owner and owner not in known:
                owner = owner.rpartition(".")[0]
            sizes[owner] += tensor.end - tensor.start
    return sizes
