"""One process at a time in a directory."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


_PAUSE = 0.2


class FileLock:
    """A lock on a file, held until `release` or the end of the process, however it ends.

    Raises:
        BlockingIOError: another process holds it, or has just removed the file.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                _lock(self._descriptor)
            except PermissionError as problem:  # what Windows says of a lock that is held
                raise BlockingIOError(str(problem)) from problem
            if not path.exists() or not os.path.samestat(os.fstat(self._descriptor), path.stat()):
                raise BlockingIOError(f"{path} was removed in the meantime")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock file, and hold it; a process that dies lets the next one in.

    Raises:
        OSError: the file cannot be made.
    """
    lock = _acquired(path)
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
