"""Changes an artifact's files as an attacker would: with digests that match again."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from errata.canonical_json import digest, dumps, file_digest


def change_tensors(root: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Give an artifact other tensors, and a manifest that lists them."""
    file = root / "unet" / "errata.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    value = json.loads((root / "errata.json").read_text())
    value.pop("manifest_sha256")
    value["files"]["unet/errata.safetensors"] = {
        "bytes": file.stat().st_size,
        "sha256": file_digest(file),
    }
    (root / "errata.json").write_bytes(dumps({**value, "manifest_sha256": digest(value)}))
