"""How one kind of journal is kept on disk: names, format, lock, and what makes it the same request again."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata import canonical_json
from errata.errors import ErrataError
from errata.request_differences import differences

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


__all__ = [
    "PUBLISHED",
    "RESULT",
    "SCRATCH",
    "TEMPORARY",
    "FileLock",
    "JournalRules",
    "check_no_foreign_files",
    "check_same_request",
    "finished_items",
    "locked",
    "read_request",
    "remove_journal",
    "remove_published",
]

SCRATCH, RESULT, PUBLISHED = "scratch", "result", "published"
TEMPORARY = ".tmp"
# Seconds between two attempts to take a lock.
_PAUSE = 0.2


@dataclass(frozen=True, kw_only=True)
class JournalRules:
    """How one kind of work is kept on disk, and what messages call it.

    Attributes:
        work: with its article, such as `an unfinished compression`.
        format: name and version, in the request file.
        error: what to raise.
        request: name of the request file.
        lock: name of the lock file.
        items: name of the folder of items; empty if they lie in the journal's own folder.
        logger: name of the logger that tells about resumed work.
        format_key: entry of the request file that holds `format`.
        request_key: entry that holds the request; None if its entries lie beside the format.
        notes: further entries of a new request file.
        has_own_folder: the directory holds nothing else, and is removed when the work is finished.
        is_shared: several processes add items at the same time; the lock is held only while one looks at the
            request, or by `Journal.alone`.
    """

    work: str
    format: str
    error: type[ErrataError]
    request: str
    lock: str
    items: str = ""
    logger: str = "errata"
    format_key: str = "format"
    request_key: str | None = "request"
    notes: Mapping[str, Any] = field(default_factory=dict)
    has_own_folder: bool = False
    is_shared: bool = False


def finished_items(path: Path, rules: JournalRules) -> tuple[str, ...]:
    """Return the names of the finished items of a journal, sorted; none where there is no journal."""
    return tuple(sorted(file.stem for file in (path / rules.items).glob("*.safetensors")))


def remove_published(path: Path, rules: JournalRules) -> None:
    """Remove the journal of a result that was finished, where a kill came before that was done."""
    with suppress(OSError):  # nothing there, or nothing that may be read
        is_published = (path / PUBLISHED).read_bytes() == rules.format.encode()
        if is_published and not (path / RESULT).exists():
            remove_journal(path, rules)


def read_request(path: Path, rules: JournalRules) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the request of a journal, and the notes beside it.

    Raises:
        ErrataError: of the kind that the rules name; it is missing, unreadable or of another format.
    """
    file = path / rules.request
    advice = f"remove `{path}` to start over, or choose another directory"
    try:
        content = canonical_json.loads_strict(file.read_bytes())
    except (OSError, ValueError) as problem:
        raise rules.error(f"`{file}` cannot be read ({problem}); {advice}") from problem
    found = content.pop(rules.format_key, None) if isinstance(content, dict) else None
    if found != rules.format:
        raise rules.error(
            f"`{file}` has the format {found!r}; this release continues {rules.format!r}; finish it with the "
            f"release that began it, {advice}"
        )
    if rules.request_key is None:
        return content, {}
    request = content.pop(rules.request_key, None)
    if not isinstance(request, dict):
        raise rules.error(f"`{file}` holds no request; {advice}")
    return request, content


def check_same_request(
    recorded: Mapping[str, Any], now: Mapping[str, Any], path: Path, rules: JournalRules
) -> None:
    """Check that work recorded under one request can go on under another.

    Raises:
        ErrataError: of the kind that the rules name; with what differs.
    """
    if found := differences(recorded, now):
        raise rules.error(
            f"`{path}` holds {rules.work} of another request: {'; '.join(found)}; repeat that request to "
            f"continue, choose another directory, or remove `{path}` to start over"
        )


def check_no_foreign_files(path: Path, rules: JournalRules) -> None:
    """Check that a directory holds a journal or nothing: it may be removed in the end."""
    request = rules.request
    # Looked at first: another process that begins the same work writes the request before anything else.
    names = {item.name for item in path.iterdir()}
    has_journal = (path / request).is_file()
    if has_journal and not rules.has_own_folder:
        return
    known = {rules.lock, request, request + TEMPORARY}  # another process may have written it just now
    if rules.has_own_folder:
        known |= {rules.items, SCRATCH, RESULT, PUBLISHED}
    if foreign := sorted(names - known):
        raise rules.error(
            f"`{path}` is not empty and holds other files than those of {rules.work} "
            f"({', '.join(foreign[:3])}); move them, or choose another directory"
        )


def remove_journal(path: Path, rules: JournalRules, *, with_folder: bool = True) -> None:
    """Remove a journal, and nothing foreign; the file that says it may be removed goes last."""
    for folder in filter(None, (rules.items, SCRATCH)):
        shutil.rmtree(path / folder, ignore_errors=True)
    with suppress(OSError):
        for file in (rules.request, rules.request + TEMPORARY, rules.lock, PUBLISHED):
            (path / file).unlink(missing_ok=True)
        if with_folder:
            path.rmdir()


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
