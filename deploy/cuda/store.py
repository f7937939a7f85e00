"""Measured times, kept between processes: one small JSON file for each layer shape."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

from errata.canonical_json import digest, dumps, loads_strict

_FORMAT = "errata-kernel-times/1"
_FOLDER = "kernel-times"
# Of a SHA-256, in hexadecimal: enough to tell shapes apart. The key is in the file and compared.
_NAME_LENGTH = 32

Key = Mapping[str, object]


def cache_folder() -> Path:
    """Return `$ERRATA_CACHE`, or `~/.cache/errata`."""
    chosen = os.environ.get("ERRATA_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "errata"


class TimesStore:
    """Seconds per candidate, by key (device, versions, layer, shape, type).

    Every key has a file of its own, which is written beside its place and renamed: whoever writes at the same
    time replaces it by another whole one, and loses no other key. What cannot be read is measured again.

    Args:
        folder: made when first written to.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (cache_folder() if folder is None else folder) / _FOLDER

    def read(self, key: Key, candidates: tuple[str, ...]) -> dict[str, float] | None:
        """Return the seconds of exactly these candidates; None if missing, or unreadable (with a warning)."""
        file = self._file(key)
        try:
            content = loads_strict(file.read_bytes())
            return _checked(content, key, candidates)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            warnings.warn(f"{file} is ignored: {error}; the kernels are measured again", stacklevel=2)
            return None

    def write(self, key: Key, seconds: Mapping[str, float]) -> None:
        """Store the times; where nothing can be written, warn and store nothing."""
        file = self._file(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(file, dumps({"format": _FORMAT, "key": dict(key), "seconds": dict(seconds)}))
        except OSError as error:
            warnings.warn(
                f"{file} cannot be written: {error}; the kernels will be measured again. Set ERRATA_CACHE to "
                "a folder that can be written to",
                stacklevel=2,
            )

    def _file(self, key: Key) -> Path:
        return self.folder / f"{digest(dict(key))[:_NAME_LENGTH]}.json"


def _replace(file: Path, content: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _checked(content: object, key: Key, candidates: tuple[str, ...]) -> dict[str, float] | None:
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it is not of the format {_FORMAT!r}")
    if content.get("key") != dict(key):
        raise ValueError("it belongs to another layer, device or version")
    seconds = content.get("seconds")
    if not isinstance(seconds, dict):
        raise ValueError("it holds no times")
    times = [value for value in seconds.values() if type(value) in (int, float) and value > 0]
    if len(times) != len(seconds) or not all(map(math.isfinite, times)):
        raise ValueError("its times are not positive numbers")
    # Another set of candidates is no damage: triton may have been installed since.
    return (
        {name: float(value) for name, value in seconds.items()} if set(seconds) == set(candidates) else None
    )
