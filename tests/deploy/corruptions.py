"""What can be done to an artifact's files: each function returns one harm, which takes the directory.

Those that say so leave every digest right, as somebody would who can rewrite all files.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file

from errata.canonical_json import digest, dumps, file_digest

Harm = Callable[[Path], object]
MANIFEST, WHOLE, UNET = "errata.json", "unet/errata.safetensors", "unet/config.json"
SCHEDULER, INDEX = "scheduler/scheduler_config.json", "model_index.json"


class Payload:
    """Whoever unpickles it makes a file called `ran` in the working directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


PICKLE = pickle.dumps(Payload())


def sign(root: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Lists every file anew and changes the manifest, whose own digest is right again."""
    manifest = json.loads((root / MANIFEST).read_text())
    manifest.pop("manifest_sha256")
    manifest["files"] = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in root.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    change(manifest)
    (root / MANIFEST).write_bytes(dumps({**manifest, "manifest_sha256": digest(manifest)}))


def in_order(*harms: Harm) -> Harm:
    return lambda root: [harm(root) for harm in harms]


def swap(name: str, other: str) -> Harm:
    """Each of two files in the other's place; no digest is made right."""

    def harm(root: Path) -> None:
        first, second = (root / name).read_bytes(), (root / other).read_bytes()
        (root / name).write_bytes(second)
        (root / other).write_bytes(first)

    return harm


def lost(name: str) -> Harm:
    """Without a file, or an empty directory; no digest is made right."""
    return lambda root: (root / name).rmdir() if (root / name).is_dir() else (root / name).unlink()


def flip(name: str, position: int) -> Harm:
    """One bit of one byte; no digest is made right."""

    def harm(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[position] ^= 1
        (root / name).write_bytes(data)

    return harm


def cut(name: str, length: int) -> Harm:
    """Only the first bytes stay; no digest is made right."""
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:length])


def raw(name: str, change: bytes | Callable[[bytes], bytes]) -> Harm:
    """Other bytes; no digest is made right."""

    def harm(root: Path) -> None:
        file = root / name
        file.write_bytes(change if isinstance(change, bytes) else change(file.read_bytes()))

    return harm


def signed(change: Callable[[dict[str, Any]], object]) -> Harm:
    """Another manifest; every digest is right."""
    return lambda root: sign(root, change)


def without(key: str) -> Harm:
    """A manifest without a key; every digest is right."""
    return signed(lambda manifest: manifest.pop(key))


def put(*keys: str | int, value: Any) -> Harm:
    """Another value in the manifest, at these keys; every digest is right."""

    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return signed(change)


def listed(name: str, record: Any) -> Harm:
    """A file that the manifest lists only; every digest is right."""
    return signed(lambda manifest: manifest["files"].update({name: record}))


def file(name: str, data: bytes | Callable[[bytes], bytes]) -> Harm:
    """A file with these contents, new or in place of another; every digest is right."""

    def harm(root: Path) -> None:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))
        sign(root)

    return harm


def settings(name: str, **changes: Any) -> Harm:
    """Other settings in a JSON file; every digest is right, the manifest's copy of them too."""

    def harm(root: Path) -> None:
        value = {**json.loads((root / name).read_text()), **changes}
        (root / name).write_text(json.dumps(value))
        sign(root, lambda manifest: manifest.update(scheduler_config=value) if name == SCHEDULER else None)

    return harm


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    """Other tensors of the denoiser; every digest is right."""

    def harm(root: Path) -> None:
        held = load_file(root / WHOLE)
        change(held)
        save_file(held, root / WHOLE)
        sign(root)

    return harm


def filled(name: str, value: float, dtype: torch.dtype | None = None) -> Harm:
    """One number of a tensor, or its type, is another; every digest is right."""

    def change(held: dict[str, torch.Tensor]) -> None:
        held[name] = held[name].clone() if dtype is None else held[name].to(dtype)
        held[name].flatten()[-1:].fill_(value)

    return tensors(change)


def header(change: Callable[[dict[str, Any]], Any], after: bytes = b"") -> Harm:
    """Another header, same data; every digest is right."""

    def harm(root: Path) -> None:
        data = (root / WHOLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        value = json.loads(data[8 : 8 + length])
        changed = change(value)
        text = changed if isinstance(changed, bytes) else json.dumps(value).encode()
        (root / WHOLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + after)
        sign(root)

    return harm


def entry(name: str, **changes: Any) -> Harm:
    """Another entry of one tensor in the header; every digest is right."""
    return header(lambda value: value[name].update(changes))


def declared(length: int) -> Harm:
    """A header of that length, declared and not there; every digest is right."""
    return file(WHOLE, lambda data: length.to_bytes(8, "little") + data[8:])


def sharded(*names: str, again: bool = False, empty: bool = False) -> Harm:
    """The denoiser's tensors in shards of these names; every digest is right.

    With `again` all shards hold the first's first tensor too; with `empty` the last holds none.
    """

    def harm(root: Path) -> None:
        held = sorted(load_file(root / WHOLE).items())
        (root / WHOLE).unlink()
        filled = len(names) - empty
        for number, name in enumerate(names):
            part = dict(held[number::filled] if number < filled else [])
            (root / "unet" / name).write_bytes(save(part | dict(held[:1] if again else [])))
        sign(root)

    return harm


def link(name: str, target: str) -> Harm:
    """A symbolic link in place of a file or directory; what was there lies where the link leads."""

    def harm(root: Path) -> None:
        if (root / name).exists():
            shutil.move(root / name, root.parent / target)
        (root / name).symlink_to(root.parent / target)

    return harm


def made(name: str, *, what: Callable[[Path], object] = Path.mkdir) -> Harm:
    """A directory or special file that no manifest lists."""
    return lambda root: what(root / name)
