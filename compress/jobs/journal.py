"""The work directory of a compression: what is finished, so that a killed run goes on where it stopped.

It lies beside the result until that is complete, and is removed then:

    NAME.partial/
        request.json                what is being made: model, calibration data, recipe, versions
        lock                        held by the process at work
        stages/STAGE.safetensors    tensors of a finished stage, with their own digest
        scratch/                    temporary files, emptied when work is taken up again
        result/                     NAME, while it is being written
        published                   made when `result` is complete, right before it is renamed to NAME

A stage file appears under its name complete or not at all, so at any moment a kill loses one stage at most.
With `published` and without `result`, NAME was finished and the rest is to be thrown away.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from errata import canonical_json
from errata.compress.jobs.stage_file import read_stage, write_stage
from errata.directories import check_is_vacant, make_directory, refusals_as, staged_directory
from errata.errors import RecipeError
from errata.file_lock import FileLock

__all__ = ["Journal", "Stage", "remove_leftovers", "without_journal", "work_directory"]

Make = Callable[[], Mapping[str, Tensor]]
Stage = Callable[[str, Make], dict[str, Tensor]]

FORMAT = "errata-compression-work/1"
_REQUEST, _LOCK, _STAGES, _RESULT, _SCRATCH = "request.json", "lock", "stages", "result", "scratch"
_REQUEST_TMP = f"{_REQUEST}.tmp"
_PUBLISHED = "published"
_SHOWN_DIFFERENCES = 5
_DIGEST_LENGTH = 64

_log = logging.getLogger(__name__)


def work_directory(out: Path) -> Path:
    """Where the unfinished work for `out` lies: `NAME.partial` beside it."""
    target = out.resolve()
    return target.with_name(f"{target.name}.partial")


def remove_leftovers(out: Path) -> None:
    """Removes the work directory of a result that was finished, where a kill came before that was done."""
    path = work_directory(out)
    published = path / _PUBLISHED
    with suppress(OSError):  # nothing there, or nothing that may be read
        if published.read_bytes() == FORMAT.encode() and not (path / _RESULT).exists():
            _remove(path)


def without_journal(name: str, make: Make) -> dict[str, Tensor]:
    """The stage of work that is not written down: computes it."""
    return dict(make())


class Journal:
    """Remembers the finished stages of one request; a context manager.

    Leaving it by an exception keeps what is finished, and nothing else: without a finished stage the work
    directory is removed.

    Args:
        out: the directory to make in the end; its parent must exist.
        request: everything that decides the bytes of the result, as JSON with readable names: two equal
            requests give equal results.

    Raises:
        RecipeError: `out` is taken, another process works on it, or its work directory holds another request
            or something foreign.
    """

    def __init__(self, out: Path, request: Mapping[str, Any]) -> None:
        self._out = out
        self.path = work_directory(out)
        self._request = dict(request)
        self._digest = canonical_json.digest(self._request)
        self._named: set[str] = set()
        self._lock: FileLock | None = None

    def __enter__(self) -> Journal:
        remove_leftovers(self._out)
        check_is_vacant(self._out, error=RecipeError)
        is_new = not self.path.exists()
        if is_new:
            make_directory(self.path, out=self._out, error=RecipeError)
        try:
            with _clear_errors(self.path):
                self._lock = self._locked()
                check_is_vacant(self._out, error=RecipeError)  # finished by another process meanwhile
                self._open()
        except BaseException:
            self._release()
            if is_new:
                shutil.rmtree(self.path, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.finished:
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    @property
    def scratch(self) -> Path:
        """A directory for temporary files; what a killed run leaves there is removed by the next one."""
        return self.path / _SCRATCH

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the stages that are written down, sorted."""
        return _finished(self.path)

    def stage(self, name: str, make: Make) -> dict[str, Tensor]:
        """The tensors of a stage, on the CPU: those of an earlier run, or `make()`, which is written down.

        A damaged file is computed again, with a warning.

        Args:
            name: letters, digits, dots, underscores and dashes; used once.
            make: computes the tensors from nothing but the request and earlier stages.

        Raises:
            RecipeError: the stage cannot be written.
            ValueError: the name is used twice, or is no file name.
        """
        if name in self._named or not name.replace(".", "").replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"stage {name!r} was asked for twice, or cannot be a file's name")
        self._named.add(name)
        file, owner = self.path / _STAGES / f"{name}.safetensors", f"{self._digest}/{name}"
        with _clear_errors(self.path):
            if file.exists():
                if (found := read_stage(file, owner=owner)) is not None:
                    return found
                _log.warning("`%s` is damaged; its stage is computed again", file)
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in make().items()}
        with _clear_errors(self.path):
            write_stage(file, tensors, owner=owner)
        return tensors

    @contextmanager
    def result(self) -> Iterator[Path]:
        """Yields a directory to write the result in; it becomes `out`, and the work directory is removed.

        Raises:
            RecipeError: `out` was filled meanwhile.
        """
        staging = self.path / _RESULT
        published = self.path / _PUBLISHED
        try:
            with _clear_errors(self.path), staged_directory(self._out, error=RecipeError, staging=staging):
                yield staging
                published.write_bytes(FORMAT.encode())
        except BaseException:
            published.unlink(missing_ok=True)
            raise
        _remove(self.path)

    def _locked(self) -> FileLock:
        try:
            return FileLock(self.path / _LOCK)
        except BlockingIOError as problem:
            raise RecipeError(
                f"another process is compressing into `{self._out}` (it holds `{self.path / _LOCK}`); "
                "wait for it, or choose another directory"
            ) from problem

    def _open(self) -> None:
        file = self.path / _REQUEST
        known = {_REQUEST, _REQUEST_TMP, _LOCK, _STAGES, _RESULT, _SCRATCH, _PUBLISHED}
        if foreign := {item.name for item in self.path.iterdir()} - known:
            raise RecipeError(
                f"`{self.path}`, where unfinished work would be kept, has other files "
                f"({', '.join(sorted(foreign)[:3])}); move them, or choose another `out`"
            )
        (self.path / _PUBLISHED).unlink(missing_ok=True)  # killed before the rename: `result` is made again
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        if finished := self.finished:
            self._check_same_request(_read_request(file))
            _log.info("resuming: %d finished stages are in `%s`", len(finished), self.path)
            return
        (self.path / _STAGES).mkdir(exist_ok=True)
        temporary = self.path / _REQUEST_TMP
        temporary.write_bytes(canonical_json.dumps({"format": FORMAT, "request": self._request}))
        temporary.replace(file)

    def _check_same_request(self, recorded: Mapping[str, Any]) -> None:
        if found := differences(recorded, self._request):
            raise RecipeError(
                f"`{self.path}` holds an unfinished compression of another request: {'; '.join(found)}; ask "
                f"for the same again to go on, choose another `out`, or remove `{self.path}` to start anew"
            )

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()


def count_finished(out: Path) -> int:
    """How many stages of the unfinished work for `out` are written down."""
    return len(_finished(work_directory(out)))


def differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each entry in which two requests differ, with both values; five, and how many more."""
    was, new = _leaves(recorded), _leaves(now)
    names = sorted(name for name in was.keys() | new.keys() if was.get(name) != new.get(name))
    found = [f"{name} was {_shown(was, name)}, is {_shown(new, name)}" for name in names]
    rest = len(found) - _SHOWN_DIFFERENCES
    return [*found[:_SHOWN_DIFFERENCES], *([f"and {rest} more"] if rest > 0 else [])]


def _remove(path: Path) -> None:
    """Removes the work directory of a finished result, and nothing foreign; what says so goes last."""
    for folder in (_STAGES, _SCRATCH):
        shutil.rmtree(path / folder, ignore_errors=True)
    with suppress(OSError):
        for file in (_REQUEST, _REQUEST_TMP, _LOCK, _PUBLISHED):
            (path / file).unlink(missing_ok=True)
        path.rmdir()


def _finished(path: Path) -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in (path / _STAGES).glob("*.safetensors")))


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        leaves |= _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _shown(leaves: Mapping[str, Any], name: str) -> str:
    if name not in leaves:
        return "nothing"
    text = str(leaves[name])
    return f"{text[:12]}…" if len(text) == _DIGEST_LENGTH else text


def _read_request(file: Path) -> Mapping[str, Any]:
    advice = f"remove `{file.parent}` to start anew, or choose another `out`"
    try:
        content = canonical_json.loads_strict(file.read_bytes())
    except (OSError, ValueError) as problem:
        raise RecipeError(f"`{file}` cannot be read ({problem}); {advice}") from problem
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecipeError(f"`{file}` is not of the format {FORMAT}; {advice}")
    request = content.get("request")
    if not isinstance(request, dict):
        raise RecipeError(f"`{file}` holds no request; {advice}")
    return request


def _clear_errors(path: Path) -> AbstractContextManager[None]:
    return refusals_as(RecipeError, doing=f"write to `{path}`", advice="make room, or choose another `out`")
