import errno
import os
from pathlib import Path

import pytest

from errata.directories import staged_directory
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
        pytest.raises(ArtifactError, match="refuses it .no such file or directory"),
        staged_directory(tmp_path / "out", error=ArtifactError),
    ):
        pytest.fail("the block must not run")


@pytest.mark.skipif(IS_ROOT, reason="root may write anywhere")
def test_refuses_a_read_only_parent(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with (
        pytest.raises(ArtifactError, match="locked` refuses it .permission denied"),
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
        pytest.raises(ArtifactError, match=f"refuses it .{os.strerror(number).lower()}"),
        staged_directory(tmp_path / "out", error=ArtifactError),
    ):
        pytest.fail("the block must not run")


def test_does_not_overwrite_what_was_made_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(ArtifactError, match="was filled meanwhile"),
        staged_directory(out, error=ArtifactError),
    ):
        out.mkdir()
        (out / "theirs").touch()
    assert contents(tmp_path) == ["out"]
    assert contents(out) == ["theirs"]
