"""One process at a time in a work directory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FileLock:
    """Holds a lock on a file until `release` or the end of the process, however it ends.

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
                raise BlockingIOError(f"{path} was removed meanwhile")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others in; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
