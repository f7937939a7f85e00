"""Digests that tell one float model, or one set of pipeline arguments, from another."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from errata import canonical_json
from errata.errors import CalibrationError
from errata.large_weights import computing_type, stored_weights
from errata.plain_json import to_plain

__all__ = ["model_fingerprint", "public_config", "value_digest"]


class _Hasher(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...


def model_fingerprint(model: torch.nn.Module) -> str:
    """Return the SHA-256, in hexadecimal, of the model's class, configuration and every tensor of its state.

    Names, dtypes, shapes and bytes count; the device and the place it was loaded from do not. A weight that
    its layer converts (see `errata.large_weights`) counts in the type that the network computes in.
    """
    hasher = hashlib.sha256()
    config = public_config(getattr(model, "config", {}))
    hasher.update(canonical_json.dumps({"class": type(model).__name__, "config": config}))
    converted, dtype = stored_weights(model), computing_type(model)
    for name, tensor in sorted(model.state_dict().items()):
        _feed(hasher, f"tensor {name}", tensor.to(dtype) if name in converted else tensor)
    return hasher.hexdigest()


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a diffusers configuration as plain JSON, without its private entries (`_name_or_path`, …)."""
    return {key: to_plain(value) for key, value in config.items() if not key.startswith("_")}


def value_digest(value: Any, *, name: str) -> str:
    """Return the SHA-256, in hexadecimal, of pipeline arguments: plain values, tensors, images, containers.

    Raises:
        CalibrationError: `name` holds something whose content cannot be digested.
    """
    hasher = hashlib.sha256()
    _feed(hasher, name, value)
    return hasher.hexdigest()


def _feed(hasher: _Hasher, name: str, value: Any) -> None:
    """Feed a value; every piece announces its kind and length, so that no two values feed the same bytes."""
    match value:
        case None | bool() | int() | float() | str() | bytes() | torch.dtype() | torch.device():
            _announce(hasher, name, type(value).__name__, repr(value))
        case Path():
            _announce(hasher, name, "path", str(value))
        case torch.Tensor():
            _announce(hasher, name, "tensor", str(value.dtype), str(tuple(value.shape)))
            flat = value.detach().cpu().contiguous().reshape(-1)
            hasher.update(flat.view(torch.uint8).numpy().data)
        case np.ndarray() if value.dtype != object:
            _announce(hasher, name, "array", str(value.dtype), str(value.shape))
            hasher.update(value.tobytes())
        case np.generic():
            _feed(hasher, name, np.asarray(value))
        case Image.Image():
            _announce(hasher, name, "image", value.mode, str(value.size))
            hasher.update(value.tobytes())
        case Mapping():
            _announce(hasher, name, "mapping", str(len(value)))
            for key in sorted(value, key=str):
                _feed(hasher, f"{name}.{key}", value[key])
        case list() | tuple():
            _announce(hasher, name, "list", str(len(value)))
            for position, item in enumerate(value):
                _feed(hasher, f"{name}[{position}]", item)
        case _:
            raise CalibrationError(
                f"`{name}` is a {type(value).__name__}, whose content cannot be compared when a run "
                "resumes; pass text, numbers, tensors, arrays, images, or lists and mappings of them"
            )


def _announce(hasher: _Hasher, *words: str) -> None:
    hasher.update(canonical_json.dumps(list(words)))
