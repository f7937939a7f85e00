"""`verify`: checks that an artifact holds what its manifest says, and nothing else.

`layer_rows` lists what the denoiser of a verified artifact is made of, without loading it. For the common
artifacts of `known_composition` both do without torch and diffusers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from errata.canonical_json import file_digest
from errata.deploy.component_files import check_component
from errata.deploy.composition import DENOISER, SCHEDULER, check_places
from errata.deploy.consistency import check_consistency
from errata.deploy.inventory import check_files
from errata.deploy.known_composition import is_known_composition, known_unet
from errata.deploy.manifest import MANIFEST_FILE, Manifest, read_manifest
from errata.deploy.safetensors_header import read_header
from errata.deploy.sharding import DENOISER_FILE, denoiser_files
from errata.deploy.signature_check import check_signature
from errata.deploy.tensor_check import check_denoiser
from errata.errors import ArtifactError
from errata.lazy_names import lazy_names

if TYPE_CHECKING:
    from errata.deploy.full_check import empty_unet
    from errata.runtime.structure import Network

__all__ = ["DENOISER_FILE", "LayerRow", "empty_unet", "layer_rows", "verify", "verify_by"]

__getattr__, __dir__ = lazy_names(__name__, {"errata.deploy.full_check": ("empty_unet",)})


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
    return verify_by(_check_contents, path, signature=signature, public_key=public_key)


def verify_by(
    check_contents: Callable[[Path, Manifest], None],
    path: str | Path,
    *,
    signature: str | Path | None = None,
    public_key: str | Path | None = None,
) -> Manifest:
    """Do what `verify` does, with this check of what is in the files that have the right digests."""
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
        check_contents(root, manifest)
    except OSError as error:
        raise ArtifactError(
            f"cannot read {error.filename or root}: {error.strerror}; make it readable"
        ) from error
    return manifest


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
    unet = _float_network(root, manifest)
    rows = [
        LayerRow(
            layer=layer.name,
            kind=layer.kind,
            shape=_weight_shape(unet, layer.name),
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


def _weight_shape(unet: Network, layer: str) -> tuple[int, ...]:
    module: Any = unet.get_submodule(layer)
    return tuple(module.weight.shape)


def _float_network(root: Path, manifest: Manifest) -> Network:
    """Return the outline of the float network, or the network on the meta device where that is not known."""
    if (outline := known_unet(root, manifest)) is not None:
        return outline
    from errata.deploy.full_check import empty_unet

    return empty_unet(root, manifest)


def _check_contents(root: Path, manifest: Manifest) -> None:
    """Check what is in the files; as in `full_check`, which decides wherever this one does not find all well.

    Raises:
        ArtifactError: as `verify`.
    """
    if _is_known_and_sound(root, manifest):
        return
    from errata.deploy.full_check import check_contents

    check_contents(root, manifest)


def _is_known_and_sound(root: Path, manifest: Manifest) -> bool:
    try:
        files, outline = denoiser_files(root, manifest), known_unet(root, manifest)
        if outline is None or not is_known_composition(root, manifest):
            return False
        check_consistency(root, outline, manifest)
        check_places(root, {DENOISER, SCHEDULER}, manifest)
        for component in (DENOISER, SCHEDULER):
            check_component(root / component)
        check_denoiser(files, outline, manifest)
    except (ArtifactError, FileNotFoundError, SafetensorError):  # the full check says what is wrong
        return False
    return True
