import json
import threading
from pathlib import Path

import pytest

from errata.deploy.cuda.store import TimesStore, cache_folder

KEY = {"device": "Some GPU", "input": [1, 2]}
TIMES = {"triton": 0.001, "bfloat16": 0.002}
NAMES = ("triton", "bfloat16")


def test_times_are_read_back(tmp_path: Path) -> None:
    store = TimesStore(tmp_path)
    assert store.read(KEY, NAMES) is None
    store.write(KEY, TIMES)
    assert TimesStore(tmp_path).read(KEY, NAMES) == TIMES
    assert store.read({**KEY, "device": "Another"}, NAMES) is None
    assert store.read(KEY, (*NAMES, "_int_mm")) is None  # another set of ways is measured again
    assert [path.suffix for path in store.folder.iterdir()] == [".json"]  # nothing is left beside it


def test_the_folder_is_the_one_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ERRATA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "errata"


GOOD = {"format": "errata-kernel-times/1", "key": KEY, "seconds": TIMES}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{half a fi", "is ignored: Expecting"),
        ("[]", "it is not of the format 'errata-kernel-times/1'"),
        (json.dumps({**GOOD, "format": "other/1"}), "it is not of the format"),
        (json.dumps({**GOOD, "key": {"device": "Another"}}), "belongs to another layer, device or version"),
        (json.dumps({**GOOD, "seconds": [1, 2]}), "holds no times"),
        (json.dumps({**GOOD, "seconds": {"triton": -1, "bfloat16": 1}}), "not positive numbers"),
        (json.dumps({**GOOD, "seconds": {"triton": True, "bfloat16": 1}}), "not positive numbers"),
        (json.dumps({**GOOD, "seconds": {"triton": "fast", "bfloat16": 1}}), "not positive numbers"),
        (json.dumps(GOOD).replace("0.001", "NaN"), "is ignored"),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(
    content: str, message: str, tmp_path: Path
) -> None:
    store = TimesStore(tmp_path)
    store.write(KEY, TIMES)
    (file,) = store.folder.iterdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match=message):
        assert store.read(KEY, NAMES) is None
    store.write(KEY, TIMES)
    assert store.read(KEY, NAMES) == TIMES


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "kernel-times").write_text("a file where the folder should be")
    store = TimesStore(tmp_path)
    with pytest.warns(UserWarning, match="cannot be written.*Set ERRATA_CACHE to a folder"):
        store.write(KEY, TIMES)
    with pytest.warns(UserWarning, match="is ignored"):
        assert store.read(KEY, NAMES) is None


def test_writers_at_the_same_time_leave_whole_files(tmp_path: Path) -> None:
    store = TimesStore(tmp_path)
    seen: list[object] = []

    def write(own: int) -> None:
        for turn in range(30):
            store.write(KEY, {"triton": own + 1.0, "bfloat16": own + 1.0})
            store.write({**KEY, "own": [own, turn]}, TIMES)
            seen.append(store.read(KEY, NAMES))

    threads = [threading.Thread(target=write, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = [{"triton": own + 1.0, "bfloat16": own + 1.0} for own in range(4)]
    assert len(seen) == 120
    assert all(times in whole for times in seen)
    assert len(list(store.folder.iterdir())) == 1 + 4 * 30  # nobody lost another's
