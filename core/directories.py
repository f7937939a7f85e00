"""Directories and files that appear complete or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errata.errors import ErrataError

__all__ = ["check_is_vacant", "make_directory", "refusals_as", "staged_directory", "write_whole"]


@contextmanager
def staged_directory(out: Path, *, error: type[ErrataError], staging: Path | None = None) -> Iterator[Path]:
    """Yield a temporary sibling of `out` to write in, and rename it to `out` when the block succeeds.

    On any exception, `KeyboardInterrupt` included, the sibling is removed and `out` is as it was.

    Args:
        out: the directory to make; may exist if it is empty. Its parent must exist.
        error: what to raise when `out` cannot be made.
        staging: the temporary directory, if not a hidden sibling of a random name; on the same file system,
            its parent exists. What an earlier, killed attempt left there is removed.
    """
    target = out.resolve()  # through a symlink, which a rename would replace or trip over
    check_is_vacant(out, error=error)
    if staging is None:
        staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
    else:
        shutil.rmtree(staging, ignore_errors=True)
    make_directory(staging, out=out, error=error)
    try:
        yield staging
        _publish(staging, target, out, error)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def check_is_vacant(out: Path, *, error: type[ErrataError]) -> None:
    """Refuse a place that cannot become a new directory, before the work that would fill it.

    Raises:
        ErrataError: of the given kind; `out` exists and is no empty directory, or cannot be looked into.
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


def make_directory(path: Path, *, out: Path, error: type[ErrataError]) -> None:
    """Make the directory `path`, which is to become `out` or stands beside it.

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


def _refused(out: Path, problem: OSError, error: type[ErrataError]) -> ErrataError:
    return error(
        f"cannot make `{out}`: `{out.parent}` refuses it ({_reason(problem)}); choose another directory"
    )


def _publish(staging: Path, target: Path, out: Path, error: type[ErrataError]) -> None:
    try:
        if os.name == "nt" and target.exists():
            target.rmdir()  # POSIX replaces an empty directory by itself, and in one step
        staging.rename(target)
    except OSError as problem:
        if problem.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise error(f"`{out}` was filled meanwhile; choose another directory or remove it") from problem
        raise error(f"cannot make `{out}`: {_reason(problem)}; choose another directory") from problem


@contextmanager
def refusals_as(error: type[ErrataError], *, doing: str, advice: str) -> Iterator[None]:
    """Turn what the file system refuses into one line: `cannot DOING: REASON; ADVICE`."""
    try:
        yield
    except OSError as problem:
        raise error(f"cannot {doing}: {_reason(problem)}; {advice}") from problem


def write_whole(path: Path, data: bytes, *, error: type[ErrataError], advice: str) -> None:
    """Write a file, in place of what is there, that is there complete or not at all, after a crash too.

    Raises:
        ErrataError: of the given kind; it cannot be written. `advice` says what to do then.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    with refusals_as(error, doing=f"write `{path}`", advice=advice):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _reason(problem: OSError) -> str:
    return (problem.strerror or str(problem)).lower()
