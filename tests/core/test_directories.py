import errno
import os
from pathlib import Path

import pytest

from errata.directories import check_new_file, staged_directory, whole_file, write_whole
from errata.errors import ArtifactError

IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    with staged_directory(out, error=ArtifactError) as staging:
        (staging / "file").write_text("x")
        assert staging.parent == out.parent
        assert not out.exists()
    assert contents(tmp_path) == ["artifact"]
    assert (out / "file").read_text() == "x"


def test_has_the_permissions_of_any_new_directory(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with staged_directory(tmp_path / "staged", error=ArtifactError):
        pass
    assert (tmp_path / "staged").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_takes_the_place_of_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out", error=ArtifactError) as staging:
        (staging / "file").touch()
    assert contents(tmp_path) == ["out"]
    assert contents(tmp_path / "out") == ["file"]


def test_accepts_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with staged_directory(Path("out"), error=ArtifactError):
        pass
    assert contents(tmp_path) == ["out"]


def test_follows_a_symlink_to_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with staged_directory(tmp_path / "link", error=ArtifactError) as staging:
        (staging / "file").touch()
    assert contents(tmp_path / "real") == ["file"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_leaves_nothing_behind_when_the_block_fails(tmp_path: Path, problem: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(problem), staged_directory(tmp_path / "out", error=ArtifactError) as staging:
        (staging / "half").touch()
        raise problem
    assert contents(tmp_path) == ["out"]
    assert contents(tmp_path / "out") == []


def test_refuses_what_exists(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    for name, message in [
        ("full", "full` exists and is not empty; choose another directory or remove it"),
        ("file", "file` exists and is not a directory; choose another directory or remove it"),
    ]:
        with (
            pytest.raises(ArtifactError, match=message),
            staged_directory(tmp_path / name, error=ArtifactError),
        ):
            pytest.fail("the block must not run")
    assert contents(tmp_path) == ["file", "full"]
    assert (tmp_path / "full" / "precious").read_text() == "keep me"


def test_refuses_a_parent_that_is_missing_or_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for parent, message in [("missing", "does not exist; create it first"), ("file", "is not a directory")]:
        with (
            pytest.raises(ArtifactError, match=f"{parent}` {message}"),
            staged_directory(tmp_path / parent / "out", error=ArtifactError),
        ):
            pytest.fail("the block must not run")
    assert contents(tmp_path) == ["file"]


def test_a_parent_that_is_there_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: int = 0o777) -> None:  # as /proc does
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(ArtifactError, match="cannot make `.*out` in `.*`: no such file or directory"),
        staged_directory(tmp_path / "out", error=ArtifactError),
    ):
        pytest.fail("the block must not run")


@pytest.mark.skipif(IS_ROOT, reason="root may write anywhere")
def test_refuses_a_read_only_parent(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with (
        pytest.raises(ArtifactError, match="in `.*locked`: permission denied"),
        staged_directory(tmp_path / "locked" / "out", error=ArtifactError),
    ):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_refuses_a_parent_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path, mode: int = 0o777) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(ArtifactError, match=f"cannot make `.*out` in `.*`: {os.strerror(number).lower()}"),
        staged_directory(tmp_path / "out", error=ArtifactError),
    ):
        pytest.fail("the block must not run")


def test_does_not_overwrite_what_was_made_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(ArtifactError, match="was filled by something else in the meantime"),
        staged_directory(out, error=ArtifactError),
    ):
        out.mkdir()
        (out / "theirs").touch()
    assert contents(tmp_path) == ["out"]
    assert contents(out) == ["theirs"]


def write(path: Path, data: bytes, staging: Path | None = None) -> None:
    write_whole(path, data, error=ArtifactError, advice="choose another file", staging=staging)


@pytest.mark.parametrize("has_fixed_name", [True, False])
def test_a_write_that_stops_halfway_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_fixed_name: bool
) -> None:
    path, staging = tmp_path / "file", tmp_path / "file.tmp" if has_fixed_name else None
    write(path, b"old", staging)

    def write_half(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(KeyboardInterrupt):
            write(path, b"something new", staging)
    assert path.read_bytes() == b"old"
    write(path, b"new", staging)
    assert path.read_bytes() == b"new"
    assert contents(tmp_path) == ["file"]


def test_what_a_kill_left_under_a_fixed_name_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.tmp").write_bytes(b"half of something long")
    write(tmp_path / "file", b"new", tmp_path / "file.tmp")
    assert contents(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_file_that_cannot_be_written_is_one_line_with_advice(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="cannot write `.*file`: no such file or directory; choose"),
        whole_file(tmp_path / "missing" / "file", error=ArtifactError, advice="choose another") as partial,
    ):
        partial.write_bytes(b"x")


def test_replaces_a_full_directory_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with (
        pytest.raises(ZeroDivisionError),
        staged_directory(tmp_path / "out", error=ArtifactError, replaces=True),
    ):
        raise ZeroDivisionError
    assert contents(tmp_path / "out") == ["old"]
    with staged_directory(tmp_path / "out", error=ArtifactError, replaces=True) as staging:
        (staging / "new").touch()
        assert contents(tmp_path / "out") == ["old"]
    assert contents(tmp_path / "out") == ["new"]
    assert contents(tmp_path) == ["out"]


def test_the_old_directory_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises(ArtifactError, match="cannot replace `.*out`: permission denied; choose another"),
        staged_directory(tmp_path / "out", error=ArtifactError, replaces=True),
    ):
        pass
    assert contents(tmp_path / "out") == ["old"]
    assert contents(tmp_path) == ["out"]


def test_a_file_that_cannot_be_made_is_found_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot write `/proc/sheet`: .*; choose another file"):
        check_new_file(Path("/proc/sheet"), error=ArtifactError)
    check_new_file(tmp_path / "new", error=ArtifactError)
    assert contents(tmp_path) == []
