"""Long work that survives a kill: what was asked for, what is finished, and who is at work.

A journal is a directory. Its parts are named by `JournalRules`:

    REQUEST                  JSON: what is being made, and notes about the items
    LOCK                     held by the process at work
    ITEMS/NAME.safetensors   the finished items: stages of a compression, shards of a calibration, batches of
                             a report

and, only where the result is another directory than the journal:

    scratch/                 temporary files, emptied when the work continues
    result/                  the result, while it is being written
    published                made when `result` is complete, right before it is renamed

A file appears under its name complete or not at all, so a kill at any moment loses one item at most. With
`published` and without `result`, the result was finished and the rest can be thrown away.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errata import canonical_json
from errata.directories import make_directory, refusals_as, staged_directory, whole_file, write_whole
from errata.fingerprint import value_digest
from errata.journal_rules import (
    PUBLISHED,
    RESULT,
    SCRATCH,
    TEMPORARY,
    FileLock,
    JournalRules,
    check_no_foreign_files,
    check_same_request,
    finished_items,
    locked,
    read_request,
    remove_journal,
)

__all__ = ["Journal", "Make", "Stage", "without_journal"]

Make = Callable[[], Mapping[str, Tensor]]
Stage = Callable[[str, Make], dict[str, Tensor]]

_DIGEST = "sha256"
_ADVICE = "free some space, or choose another directory"


class Journal:
    """The finished items of one request; a context manager.

    Leaving it by an exception keeps what is finished. Without a finished item, no trace is left.

    Args:
        path: its directory.
        request: everything that decides the bytes of the result, as JSON with readable names: two equal
            requests give equal results.
        rules: what kind of work it is.
        out: the result, where that is another directory.
        check_place: raises if the result cannot be made there; called before anything is written, and again
            under the lock.

    Raises:
        ErrataError: of the kind that the rules name; another process is at work, or the directory holds
            another request or foreign files, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        request: Mapping[str, Any],
        rules: JournalRules,
        *,
        out: Path | None = None,
        check_place: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = path
        self.notes: dict[str, Any] = dict(rules.notes)
        self.request: dict[str, Any] = dict(request)
        self._rules = rules
        self._out = path if out is None else out
        self._check_place = check_place
        self._digest = canonical_json.digest(self.request)
        self._named: set[str] = set()
        self._log = logging.getLogger(rules.logger)
        self._lock: FileLock | None = None
        self._was_made = False

    def __enter__(self) -> Self:
        self._check_place()
        self._was_made = not self.path.exists()
        self._make_folder()
        try:
            with self.refusals():
                check_no_foreign_files(self.path, self._rules)
                if self._rules.is_shared:
                    self._open_shared()
                else:
                    self._lock = self._locked()
                    self._check_place()  # another process may have finished it in the meantime
                    self._open()
        except BaseException:
            self._release()
            if self._was_made and not self._rules.is_shared:
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._rules.is_shared and not self.finished:
            self._clear()
        self._release()

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the finished items, sorted."""
        return finished_items(self.path, self._rules)

    @property
    def scratch(self) -> Path:
        """A directory for temporary files; what a killed run leaves there is removed by the next one."""
        folder = self.path / SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def item(self, name: str) -> Path:
        """Return the file of an item, finished or not."""
        return self.path / self._rules.items / f"{name}.safetensors"

    def write(self, name: str, data: bytes) -> None:
        """Keep an item; whole or not at all.

        Raises:
            ErrataError: of the kind that the rules name; it cannot be written.
        """
        file = self.item(name)
        with self.refusals():
            file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, data, error=self._rules.error, advice=_ADVICE, staging=self._staging(file))

    def note(self, **notes: Any) -> None:
        """Write entries into the request file, over those of the same names; within `alone` if shared.

        Raises:
            ErrataError: of the kind that the rules name; it cannot be written.
        """
        self.notes |= notes
        rules, file = self._rules, self.path / self._rules.request
        request = {rules.request_key: self.request} if rules.request_key else self.request
        data = canonical_json.dumps({rules.format_key: rules.format, **request, **self.notes})
        staging = file.with_name(file.name + TEMPORARY)
        write_whole(file, data, error=rules.error, advice=_ADVICE, staging=staging)

    def stage(self, name: str, make: Make) -> dict[str, Tensor]:
        """Return the tensors of an item, on the CPU: those of an earlier run, or `make()`, which is kept.

        A damaged file is computed again, with a warning.

        Args:
            name: letters, digits, dots, underscores and dashes; used once.
            make: computes the tensors from nothing but the request and earlier stages.

        Raises:
            ErrataError: of the kind that the rules name; the item cannot be written.
            ValueError: the name is used twice, or cannot be a file name.
        """
        if name in self._named or not name.replace(".", "").replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"stage {name!r} was used before, or cannot be a file name; choose another name")
        self._named.add(name)
        file, owner = self.item(name), f"{self._digest}/{name}"
        with self.refusals():
            if file.exists():
                if (found := _read_stage(file, owner=owner)) is not None:
                    return found
                self._log.warning("`%s` is damaged; its stage is computed again", file)
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in make().items()}
        metadata = {_DIGEST: value_digest(tensors, name=owner)}
        with whole_file(
            file, error=self._rules.error, advice=_ADVICE, staging=self._staging(file)
        ) as partial:
            save_file(tensors, partial, metadata=metadata)
        return tensors

    @contextmanager
    def result(self) -> Iterator[Path]:
        """Yield a directory to write the result in; it becomes `out`, and the journal is removed."""
        staging, published = self.path / RESULT, self.path / PUBLISHED
        try:
            with self.refusals(), staged_directory(self._out, error=self._rules.error, staging=staging):
                yield staging
                published.write_bytes(self._rules.format.encode())
        except BaseException:
            published.unlink(missing_ok=True)
            raise
        remove_journal(self.path, self._rules)

    def finish(self, name: str) -> None:
        """Rename the request file, which says that the items beside it are the finished result."""
        with self.refusals():
            (self.path / self._rules.request).replace(self.path / name)
            (self.path / self._rules.lock).unlink(missing_ok=True)

    def alone(self) -> AbstractContextManager[None]:
        """Wait until no other process is inside; a process that dies lets the next one in."""
        return locked(self.path / self._rules.lock)

    def refusals(self) -> AbstractContextManager[None]:
        """Turn an error of the file system into the journal's own, in one line."""
        return refusals_as(self._rules.error, doing=f"write to `{self.path}`", advice=_ADVICE)

    def _make_folder(self) -> None:
        if self._was_made and self._rules.has_own_folder:
            make_directory(self.path, out=self._out, error=self._rules.error)
        elif self._was_made:
            with self.refusals():
                self.path.mkdir(parents=True, exist_ok=True)

    def _locked(self) -> FileLock:
        try:
            return FileLock(self.path / self._rules.lock)
        except BlockingIOError as problem:
            raise self._rules.error(
                f"another process is writing to `{self._out}` (it holds `{self.path / self._rules.lock}`); "
                "wait until it ends, or choose another directory"
            ) from problem

    def _open(self) -> None:
        """Continue an earlier run's work, or write the request of new work."""
        (self.path / PUBLISHED).unlink(missing_ok=True)  # killed before the rename: `result` is made again
        shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
        if self.finished:
            self._read()
            self._log.info(
                "resuming: %d finished %s are in `%s`", len(self.finished), self._rules.items, self.path
            )
            return
        (self.path / self._rules.items).mkdir(exist_ok=True)
        self.note()

    def _open_shared(self) -> None:
        """Continue what several processes fill; only the first of them writes the request."""
        request = self.path / self._rules.request
        if not request.is_file():
            with self.alone():
                if not request.is_file():
                    self._check_place()  # another process may have finished it in the meantime
                    self.note()
                    return
        self._read()

    def _read(self) -> None:
        """Read what is recorded, and check that it is the same request."""
        recorded, self.notes = read_request(self.path, self._rules)
        check_same_request(recorded, self.request, self.path, self._rules)

    def _staging(self, file: Path) -> Path | None:
        """Return a fixed name for the temporary file where no other process writes."""
        return None if self._rules.is_shared else file.with_name(file.name + TEMPORARY)

    def _clear(self) -> None:
        """Remove everything of a journal without a finished item."""
        shutil.rmtree(self.path / RESULT, ignore_errors=True)
        (self.path / PUBLISHED).unlink(missing_ok=True)
        remove_journal(self.path, self._rules, with_folder=self._was_made or self._rules.has_own_folder)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def without_journal(name: str, make: Make) -> dict[str, Tensor]:
    """Return the tensors of a stage that is not kept: computes it."""
    return dict(make())


def _read_stage(file: Path, *, owner: str) -> dict[str, Tensor] | None:
    """Return the tensors, copied into memory; None if the file is damaged or belongs to something else.

    `owner` enters the digest: a file of another stage or request is not taken for this one.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            recorded = (opened.metadata() or {}).get(_DIGEST)
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None
    return tensors if value_digest(tensors, name=owner) == recorded else None
