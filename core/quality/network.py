"""Feature networks: their interface, and how the command line names one.

A feature network is any `nn.Module` that maps images (B, C, H, W), float32 in [0, 1], to features (B, D). It
may say more about itself, and each of these is optional:

    name: str         what the metric is called after, "Fréchet distance in `name`"
    channels: int     1 for grey images, 3 for RGB
    resolution: int   the one size of images, in pixels, that it takes
    dimension: int    D
    resizing: str     what it does to images of another size, for the record of how a figure was measured
    logits(features)  class scores (B, K), which the inception score needs
"""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from errata.embedded import load_features
from errata.errors import ReportError

_ALLOWED = (
    '"digit-features", "inception", "inception:WEIGHTS_FILE", "package.module:attribute", or the directory '
    "of a vision model that transformers saved"
)


def network_name(network: nn.Module) -> str:
    """Return the network's own `name`, else its class."""
    name = getattr(network, "name", None)
    return name if isinstance(name, str) else type(network).__name__


def weights_digest(network: nn.Module) -> str:
    """Return the SHA-256 of names, shapes, types and values of all parameters and buffers, sorted."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)} {data.dtype}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def channels_of(network: nn.Module) -> int | None:
    """Return its `channels`, else those of its first convolution, else None."""
    channels = getattr(network, "channels", None)
    if isinstance(channels, int):
        return channels
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return first.in_channels if first is not None else None


@torch.inference_mode()
def dimension_of(network: nn.Module) -> int | None:
    """Return its `dimension`; else that of a black image's features if it has a `resolution`; else None."""
    dimension, resolution = getattr(network, "dimension", None), getattr(network, "resolution", None)
    if isinstance(dimension, int):
        return dimension
    if not isinstance(resolution, int):
        return None
    black = torch.zeros(1, channels_of(network) or 3, resolution, resolution, device=device_of(network))
    try:
        return int(network(black).shape[-1])
    except (RuntimeError, ValueError, ReportError) as problem:
        raise ReportError(
            f"feature network `{network_name(network)}` fails on a black image of {resolution} pixels, its "
            f"own `resolution`: {problem}"
        ) from problem


def device_of(network: nn.Module) -> torch.device:
    """Return the device of its first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def has_logits(network: nn.Module) -> bool:
    """Return whether it turns features into class scores, as the inception score needs."""
    return callable(getattr(network, "logits", None))


def open_network(spec: str) -> nn.Module:
    """Return the feature network that a command line names, in evaluation mode, without gradients.

    `"digit-features"` is the embedded one; `"inception"` that of the FID, with `"inception:FILE"` for
    weights from a local file; a directory holds a vision model that transformers saved, such as a CLIP or a
    DINOv2; and `"package.module:attribute"` is imported: an `nn.Module`, or what returns one when called
    without arguments.

    Raises:
        ReportError: there is no such network, or it cannot be loaded.
    """
    name, _, rest = spec.partition(":")
    if spec == "digit-features":
        network: nn.Module = load_features()
    elif name == "inception" and (rest or spec == "inception"):
        from errata.quality.inception import InceptionFeatures

        network = InceptionFeatures(weights=Path(rest) if rest else None)
    elif Path(spec).is_dir():
        from errata.quality.vision import VisionFeatures

        network = VisionFeatures(Path(spec))
    else:
        network = _imported(spec)
    return network.eval().requires_grad_(False)


def _imported(spec: str) -> nn.Module:
    module_name, _, attribute = spec.partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise ReportError(f"feature network `{spec}` is unknown; allowed are {_ALLOWED}")
    try:
        found: Any = getattr(importlib.import_module(module_name), attribute)
        network = found if isinstance(found, nn.Module) else found()
    except Exception as problem:  # the user's code raises whatever it likes
        raise ReportError(
            f"feature network `{spec}` cannot be imported: {type(problem).__name__}: {problem}; "
            f"`{module_name}` must be importable from here, and `{attribute}` an nn.Module or what returns "
            "one without arguments"
        ) from problem
    if not isinstance(network, nn.Module):
        raise ReportError(
            f"feature network `{spec}` is a {type(network).__name__}; it must be an nn.Module, or return one "
            "when called without arguments"
        )
    return network
