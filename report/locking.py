"""One process at a time begins a report; the others wait for what it writes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errata.file_lock import FileLock

_NAME = ".lock"
_PAUSE = 0.2


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until nobody else is inside; a process that dies lets the next one in."""
    lock = _acquired(folder / _NAME)
    try:
        yield
    finally:
        lock.release()


def _acquired(path: Path) -> FileLock:
    while True:
        try:
            return FileLock(path)
        except BlockingIOError:
            time.sleep(_PAUSE)
