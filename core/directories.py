"""Directories and files that appear complete or not at all: the only place that writes aside and renames."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errata.errors import ErrataError

__all__ = [
    "check_is_vacant",
    "check_new_file",
    "make_directory",
    "refusals_as",
    "staged_directory",
    "whole_file",
    "write_whole",
]


@contextmanager
def staged_directory(
    out: Path, *, error: type[ErrataError], staging: Path | None = None, replaces: bool = False
) -> Iterator[Path]:
    """Yield a temporary sibling of `out` to write in, and rename it to `out` when the block succeeds.

    On any exception, `KeyboardInterrupt` included, the sibling is removed and `out` is as it was.

    Args:
        out: the directory to make; may exist if it is empty. Its parent must exist.
        error: what to raise when `out` cannot be made.
        staging: the temporary directory, if not a hidden sibling with a random name; on the same file system,
            its parent exists. What an earlier, killed attempt left there is removed.
        replaces: `out` may exist and be full; it is removed once the new directory is in its place.
    """
    target = out.resolve()  # through a symlink, which a rename would replace or trip over
    if not replaces:
        check_is_vacant(out, error=error)
    if staging is None:
        staging = _hidden_sibling(target, "partial")
    else:
        shutil.rmtree(staging, ignore_errors=True)
    make_directory(staging, out=out, error=error)
    try:
        yield staging
        if replaces and target.exists():
            _swap(staging, target, out, error)
        else:
            _publish(staging, target, out, error)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def check_is_vacant(out: Path, *, error: type[ErrataError]) -> None:
    """Check that a place can become a new directory, before the work that would fill it.

    Raises:
        ErrataError: of the given kind; `out` exists and is not an empty directory, or cannot be read.
    """
    target = out.resolve()
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise error(f"`{out}` exists and is not a directory; choose another directory or remove it")
        if any(target.iterdir()):
            raise error(f"`{out}` exists and is not empty; choose another directory or remove it")
        if target.is_mount():
            raise error(f"`{out}` is a mount point, which cannot be replaced; choose a directory inside it")
    except OSError as problem:
        raise error(f"cannot look into `{out}`: {_reason(problem)}; choose another directory") from problem


def check_new_file(path: Path, *, error: type[ErrataError]) -> None:
    """Check that a new file can be made at a place, before the work that would fill it.

    Raises:
        ErrataError: of the given kind; something is there, or its folder is not, or cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise error(f"`{path}` exists; choose another file or remove it")
    if not path.parent.is_dir():
        raise error(f"cannot write `{path}`: `{path.parent}` is not a directory; create it first")
    trial = _hidden_sibling(path.absolute(), "trial")
    with refusals_as(error, doing=f"write `{path}`", advice="choose another file"):
        trial.touch(exist_ok=False)
        trial.unlink()


def make_directory(path: Path, *, out: Path, error: type[ErrataError]) -> None:
    """Make the directory `path`, which will become `out` or stands beside it.

    Raises:
        ErrataError: of the given kind, about `out`.
    """
    parent = out.parent
    try:
        path.mkdir()
    except FileNotFoundError as problem:
        if parent.exists():  # as in /proc, where nothing can be made
            raise _refused(out, problem, error) from problem
        raise error(f"cannot make `{out}`: `{parent}` does not exist; create it first") from problem
    except NotADirectoryError as problem:
        raise error(f"cannot make `{out}`: `{parent}` is not a directory; choose another one") from problem
    except OSError as problem:
        raise _refused(out, problem, error) from problem


@contextmanager
def refusals_as(error: type[ErrataError], *, doing: str, advice: str) -> Iterator[None]:
    """Turn an error of the file system into one line: `cannot DOING: REASON; ADVICE`."""
    try:
        yield
    except OSError as problem:
        raise error(f"cannot {doing}: {_reason(problem)}; {advice}") from problem


@contextmanager
def whole_file(
    path: Path, *, error: type[ErrataError], advice: str, staging: Path | None = None
) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write, and rename it to `path` when the block succeeds.

    It replaces what is there. A crash or a power cut leaves the old file or the new one, whole.

    Args:
        path: the file to make; its directory must exist.
        error: what to raise when the file cannot be written.
        advice: what to do then.
        staging: the temporary file, if not a hidden sibling with a random name. A fixed name is for a single
            writer: a kill leaves at most this file, and the next attempt overwrites it.
    """
    partial = staging or _hidden_sibling(path, "partial")
    with refusals_as(error, doing=f"write `{path}`", advice=advice):
        try:
            yield partial
            _to_disk(partial)
            partial.replace(path)
            _to_disk(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_whole(
    path: Path, data: bytes, *, error: type[ErrataError], advice: str, staging: Path | None = None
) -> None:
    """Write a file, in place of what is there, as `whole_file` does.

    Raises:
        ErrataError: of the given kind; it cannot be written.
    """
    with whole_file(path, error=error, advice=advice, staging=staging) as partial:
        partial.write_bytes(data)


def _hidden_sibling(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{ending}")


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a directory, would survive a power cut."""
    if path.is_dir():
        if os.name == "nt":
            return  # Windows opens no directories, and needs it not
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(staging: Path, target: Path, out: Path, error: type[ErrataError]) -> None:
    try:
        if os.name == "nt" and target.exists():
            target.rmdir()  # POSIX replaces an empty directory by itself, and in one step
        staging.rename(target)
    except OSError as problem:
        if problem.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise error(
                f"`{out}` was filled by something else in the meantime; choose another directory or remove it"
            ) from problem
        raise error(f"cannot make `{out}`: {_reason(problem)}; choose another directory") from problem


def _swap(staging: Path, target: Path, out: Path, error: type[ErrataError]) -> None:
    """Put `staging` in the place of `target`, which is removed once the new one is there."""
    old = _hidden_sibling(target, "old")
    try:
        target.rename(old)
        try:
            staging.rename(target)
        except OSError:
            old.rename(target)
            raise
    except OSError as problem:
        raise error(f"cannot replace `{out}`: {_reason(problem)}; choose another directory") from problem
    shutil.rmtree(old)


def _refused(out: Path, problem: OSError, error: type[ErrataError]) -> ErrataError:
    return error(f"cannot make `{out}` in `{out.parent}`: {_reason(problem)}; choose another directory")


def _reason(problem: OSError) -> str:
    return (problem.strerror or str(problem)).lower()
