import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from errata.compress.jobs.stages import RULES, count_finished, open_journal, work_directory
from errata.errors import RecipeError, ReportError
from errata.journal import Journal, without_journal
from errata.journal_rules import FileLock
from errata.report.store import RULES as SHARED

REQUEST = {"model": "a" * 64, "recipe": {"bits": 4, "cache": None}}


def never() -> dict[str, Tensor]:
    raise AssertionError("an earlier run had finished this")


def interrupt(out: Path, stages: Mapping[str, Tensor], request: Mapping[str, object] = REQUEST) -> None:
    """A run that finishes these stages and is stopped."""
    with pytest.raises(KeyboardInterrupt), open_journal(out, request) as journal:
        for name, value in stages.items():
            journal.stage(name, partial(dict, x=value))
        raise KeyboardInterrupt


def test_a_finished_stage_is_not_computed_again(tmp_path: Path) -> None:
    values = {
        "bits": torch.tensor([True, False]),
        "codes": torch.arange(-4, 4, dtype=torch.int8).reshape(2, 4).T,
        "half": torch.randn(3).to(torch.bfloat16),
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "nothing": torch.empty(0, 3),
    }
    with pytest.raises(KeyboardInterrupt), open_journal(tmp_path / "out", REQUEST) as journal:
        first = journal.stage("one.0", lambda: values)
        raise KeyboardInterrupt
    with open_journal(tmp_path / "out", REQUEST) as journal:
        assert journal.finished == ("one.0",)
        again = journal.stage("one.0", never)
    for name, value in values.items():
        for found in (first[name], again[name]):
            assert torch.equal(found, value)
            assert found.dtype == value.dtype
            assert found.is_contiguous()


def test_what_a_stage_returns_is_its_own(tmp_path: Path) -> None:
    value = torch.zeros(2)
    with open_journal(tmp_path / "out", REQUEST) as journal:
        found = journal.stage("one", lambda: {"a": value, "b": value})
        found["a"] += 1
    assert value.tolist() == found["b"].tolist() == [0, 0]


def test_the_result_appears_complete_and_the_work_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_journal(out, REQUEST) as journal:
        journal.stage("one", lambda: {"x": torch.ones(1)})
        with journal.result() as staging:
            (staging / "file").write_text("x")
            assert not out.exists()
            assert staging.parent == work_directory(out) == tmp_path / "out.partial"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["file"]


def test_a_result_that_fails_leaves_the_stages(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_journal(out, REQUEST) as journal:
        journal.stage("one", lambda: {"x": torch.ones(1)})
        with pytest.raises(ZeroDivisionError), journal.result() as staging:
            (staging / "file").write_text("x")
            raise ZeroDivisionError
    assert count_finished(out) == 1
    assert not out.exists()
    (work_directory(out) / "result").mkdir()  # as a kill leaves it
    (work_directory(out) / "result" / "half").write_text("")
    with open_journal(out, REQUEST) as journal, journal.result() as staging:
        assert list(staging.iterdir()) == []


@pytest.mark.parametrize("is_kept", [True, False], ids=["result kept", "result removed"])
def test_a_kill_right_after_the_rename_does_no_harm(
    is_kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("errata.journal.remove_journal", stop)
        with pytest.raises(KeyboardInterrupt), open_journal(out, REQUEST) as journal:
            journal.stage("one", lambda: {"x": torch.ones(1)})
            with journal.result() as staging:
                (staging / "file").write_text("x")
    assert (out / "file").exists()
    assert count_finished(out) == 1
    if is_kept:
        with pytest.raises(RecipeError, match="exists and is not empty"):
            open_journal(out, REQUEST).__enter__()
        assert (out / "file").exists()
    else:
        (out / "file").unlink()
        with open_journal(out, {"model": "another"}) as journal:
            assert journal.finished == ()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_right_before_the_rename_loses_no_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, {"one": torch.ones(1)})
    (work_directory(out) / "result").mkdir()
    (work_directory(out) / "published").write_text(RULES.format)
    with open_journal(out, REQUEST) as journal:
        journal.stage("one", never)
    with open_journal(out, REQUEST) as journal:
        journal.stage("one", never)


def test_a_result_that_cannot_be_published_keeps_the_stages(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(RecipeError, match="was filled by something else in the meantime"),
        open_journal(out, REQUEST) as journal,
    ):
        journal.stage("one", lambda: {"x": torch.ones(1)})
        with journal.result():
            out.mkdir()
            (out / "foreign").touch()
    (out / "foreign").unlink()
    with open_journal(out, REQUEST) as journal:
        journal.stage("one", never)


def test_without_a_finished_stage_nothing_is_left(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "renamed", "of another request"])
def test_a_damaged_stage_is_computed_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    interrupt(out, {"one": torch.ones(5), "two": torch.zeros(5)})
    stages = work_directory(out) / "stages"
    one, two = stages / "one.safetensors", stages / "two.safetensors"
    if damage == "cut":
        one.write_bytes(one.read_bytes()[:-3])
    elif damage == "flipped":
        data = bytearray(one.read_bytes())
        data[-1] ^= 1
        one.write_bytes(data)
    elif damage == "renamed":
        one.write_bytes(two.read_bytes())
    else:
        interrupt(tmp_path / "other", {"one": torch.zeros(5)}, {"model": "b"})
        one.write_bytes((work_directory(tmp_path / "other") / "stages" / "one.safetensors").read_bytes())
    with open_journal(out, REQUEST) as journal:
        assert journal.stage("one", lambda: {"x": torch.ones(5)})["x"].tolist() == [1] * 5
        assert journal.stage("two", never)["x"].tolist() == [0] * 5
    assert caplog.messages == [f"`{one}` is damaged; its stage is computed again"]


def test_another_request_is_refused_by_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, {"one": torch.ones(1)})
    other = {"model": "b" * 64, "recipe": {"bits": 8, "cache": {"interval": 5}}}
    with pytest.raises(RecipeError) as caught, open_journal(out, other):
        pass
    assert (
        "model was aaaaaaaaaaaa…, is now bbbbbbbbbbbb…; recipe.bits was 4, is now 8; "
        "recipe.cache.interval was absent, is now 5; repeat that request to continue, "
        f"choose another directory, or remove `{work_directory(out)}` to start over"
    ) in str(caught.value)
    assert count_finished(out) == 1
    with open_journal(out, REQUEST) as journal:
        journal.stage("one", never)


def test_a_request_without_a_finished_stage_gives_way(tmp_path: Path) -> None:
    work = work_directory(tmp_path / "out")
    (work / "stages").mkdir(parents=True)
    (work / "request.json").write_text("{")
    with open_journal(tmp_path / "out", REQUEST):
        assert json.loads((work / "request.json").read_text())["request"] == REQUEST


def test_what_is_not_ours_is_refused_and_kept(tmp_path: Path) -> None:
    work = work_directory(tmp_path / "out")
    work.mkdir()
    (work / "thesis.tex").write_text("precious")
    (work / "published").write_text("in 1905")
    with (
        pytest.raises(
            RecipeError,
            match=r"other files than those of an unfinished compression \(thesis.tex\); move them, or",
        ),
        open_journal(tmp_path / "out", REQUEST),
    ):
        pass
    assert (work / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "x"}', '{"format": "errata-compression-work/1"}'])
def test_an_unreadable_request_is_refused(content: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt(out, {"one": torch.ones(1)})
    (work_directory(out) / "request.json").write_text(content)
    with pytest.raises(RecipeError, match=r"request.json` .*remove `.*out.partial` to start over"):
        open_journal(out, REQUEST).__enter__()


def test_a_place_that_is_taken_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(RecipeError, match="exists and is not empty"):
        open_journal(tmp_path, REQUEST).__enter__()
    with pytest.raises(RecipeError, match="does not exist; create it first"):
        open_journal(tmp_path / "missing" / "out", REQUEST).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not work_directory(tmp_path).exists()


def test_names_of_stages_are_names_of_files_used_once(tmp_path: Path) -> None:
    make: Callable[[], dict[str, Tensor]] = dict
    with open_journal(tmp_path / "out", REQUEST) as journal:
        journal.stage("up_blocks.0-1", make)
        for name in ("up_blocks.0-1", "", "..", "a/b"):
            with pytest.raises(ValueError, match="was used before, or cannot be"):
                journal.stage(name, make)


def test_two_do_not_work_on_the_same(tmp_path: Path) -> None:
    """That a lock does not outlive a killed process is seen in test_resume."""
    out = tmp_path / "out"
    with open_journal(out, REQUEST) as journal:
        journal.stage("one", lambda: {"x": torch.ones(1)})
        with pytest.raises(RecipeError, match=r"another process is writing to .*; wait until it ends, or"):
            open_journal(out, REQUEST).__enter__()
        assert count_finished(out) == 1
    with open_journal(out, REQUEST):
        pass


def test_work_without_a_journal_is_computed() -> None:
    assert without_journal("one", lambda: {"x": torch.ones(1)})["x"] == 1


def test_a_shared_journal_is_filled_by_several_at_the_same_time(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "measurements"
    with Journal(folder, {"seed": 0}, SHARED) as one, Journal(folder, {"seed": 0}, SHARED) as other:
        one.write("row/000000", b"first")
        other.write("row/000001", b"second")
        assert one.item("row/000001").read_bytes() == b"second"
    content = json.loads((folder / "settings.json").read_text())
    assert content == {"schema": "errata-measurements/1", "seed": 0}
    assert sorted(path.name for path in (folder / "row").iterdir()) == [
        "000000.safetensors",
        "000001.safetensors",
    ]


def test_a_shared_journal_refuses_another_request_even_before_its_first_item(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Journal(tmp_path / "out", {"seed": 0}, SHARED):
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "settings.json").is_file()  # another process may be at work there
    with pytest.raises(
        ReportError, match=r"holds measurements of another request: seed was 0, is now 1; rep"
    ):
        Journal(tmp_path / "out", {"seed": 1}, SHARED).__enter__()
    with Journal(tmp_path / "out", {"seed": 0}, SHARED):
        pass


def test_one_process_at_a_time_does_what_is_done_once(tmp_path: Path) -> None:
    with Journal(tmp_path, {"seed": 0}, SHARED) as journal:
        with journal.alone(), pytest.raises(BlockingIOError):
            FileLock(tmp_path / ".lock")
        FileLock(tmp_path / ".lock").release()


def test_a_shared_journal_refuses_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(
        ReportError, match=r"other files than those of measurements \(thesis.tex\); move them"
    ):
        Journal(tmp_path, {"seed": 0}, SHARED).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
