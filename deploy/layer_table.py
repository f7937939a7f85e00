"""What the denoiser of an artifact is made of, layer by layer, without loading it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from errata.deploy.manifest import Manifest
from errata.deploy.safetensors_header import read_header
from errata.deploy.sharding import denoiser_files
from errata.deploy.verification import empty_unet
from errata.runtime.layers import float_layer


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
    """A row for each layer of the scheme, then for each attention; the artifact has been verified."""
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
    """Bytes of the tensors of each module, those of modules inside it left out."""
    known, sizes = set(modules), Counter[str]()
    for file in files:
        for name, tensor in read_header(file).tensors.items():
            owner = name
            while owner and owner not in known:
                owner = owner.rpartition(".")[0]
            sizes[owner] += tensor.end - tensor.start
    return sizes
