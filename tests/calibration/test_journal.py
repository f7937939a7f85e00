"""Interrupted work continues, byte for byte, and nothing else is ever touched."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from forked import ForkServer

from errata import CalibrationError, calibration
from errata.calibration.document import PARTIAL, Recording
from errata.calibration.shards import write_shard
from errata.journal import Journal
from errata.journal_rules import FileLock

OPTIONS: dict[str, Any] = {"num_inference_steps": 4, "num_samples": 7, "batch_size": 2, "seed": 3}
NUM_CALLS = 4 * 4  # four sample-batches of four steps

KILLED = """
import os, signal, sys
import torch
from errata import calibration
torch.set_num_threads({threads})
pipe = calibration.load_pipeline({pipeline!r})
calls = []
def die(*_):
    calls.append(1)
    if len(calls) == {fatal_call}:
        os.kill(os.getpid(), signal.SIGKILL)
pipe.unet.register_forward_hook(die)
calibration.collect(pipe, {out!r}, **{options!r})
"""


class _Killed(BaseException):
    """Stands in for a kill that leaves no time to clean up."""


def _files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def _interrupt(
    pipe: DDIMPipeline, out: Path, monkeypatch: pytest.MonkeyPatch, *, after: int, **changes: Any
) -> None:
    """Collect `after` shards, then stop as a kill would."""

    def stop(journal: Journal, index: int, *args: Any, **kwargs: Any) -> Any:
        if index == after:
            raise _Killed
        return write_shard(journal, index, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("errata.calibration.document.write_shard", stop)
        patch.setattr(Journal, "_clear", lambda _: None)
        with pytest.raises(_Killed):
            calibration.collect(pipe, out, **OPTIONS | changes)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_run_is_finished_with_the_same_bytes(
    tiny_pipeline: DDIMPipeline,
    saved_pipeline: Path,
    count_calls: list[int],
    tmp_path: Path,
    forked: ForkServer,
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    calibration.collect(tiny_pipeline, whole, **OPTIONS)
    assert len(count_calls) == NUM_CALLS
    script = KILLED.format(
        threads=torch.get_num_threads(),
        pipeline=str(saved_pipeline),
        fatal_call=11,
        out=str(killed),
        options=OPTIONS,
    )
    ended = forked.run(script)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert sorted(_files(killed)) == [
        ".lock",
        PARTIAL,
        "shards/00000.safetensors",
        "shards/00001.safetensors",
    ]
    with pytest.raises(
        CalibrationError, match="holds an unfinished calibration; run `errata calibrate` again"
    ):
        calibration.load(killed)

    finished = {
        name: (killed / name).stat().st_mtime_ns for name in _files(killed) if name.startswith("shards")
    }
    count_calls.clear()
    calibration.collect(tiny_pipeline, killed, **OPTIONS)
    assert len(count_calls) == NUM_CALLS - 2 * 4
    assert all((killed / name).stat().st_mtime_ns == time for name, time in finished.items())
    assert _files(killed) == _files(whole)


def test_torn_and_altered_files_are_made_again(
    tiny_pipeline: DDIMPipeline, count_calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    calibration.collect(tiny_pipeline, whole, **OPTIONS)
    _interrupt(tiny_pipeline, out, monkeypatch, after=2)
    shards = out / "shards"
    (shards / "00002.safetensors.tmp").write_bytes(b"half a sha")  # killed while writing it
    (shards / "00002.safetensors").write_bytes(b"unknown to the journal")  # ... or before it was noted down
    (out / f"{PARTIAL}.tmp").write_bytes(b"{")
    altered = bytearray((shards / "00000.safetensors").read_bytes())
    altered[-1] ^= 1
    (shards / "00000.safetensors").write_bytes(altered)
    count_calls.clear()
    calibration.collect(tiny_pipeline, out, **OPTIONS)
    assert len(count_calls) == NUM_CALLS - 1 * 4
    assert _files(out) == _files(whole)


def test_damage_does_not_spoil_the_journal_of_a_second_kill(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    _interrupt(tiny_pipeline, out, monkeypatch, after=2)
    (out / "shards" / "00000.safetensors").unlink()
    _interrupt(tiny_pipeline, out, monkeypatch, after=0)
    calibration.collect(tiny_pipeline, out, **OPTIONS).verify()


def test_a_kill_after_the_last_shard_needs_no_calls(
    tiny_pipeline: DDIMPipeline, count_calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(Recording, "finish", stop)
        with pytest.raises(_Killed):
            calibration.collect(tiny_pipeline, tmp_path / "set", **OPTIONS)
    count_calls.clear()
    assert calibration.collect(tiny_pipeline, tmp_path / "set", **OPTIONS).num_samples == 7
    assert count_calls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, r"another request: seed was 3, is now 4; repeat that request"),
        ({"num_samples": 9}, "num_samples was 7, is now 9"),
        (
            {"num_inference_steps": 5, "batch_size": 1},
            "num_inference_steps was 4, is now 5; batch_size was 2, is now 1",
        ),
        ({"inputs": [{"eta": 0.5}] * 4}, "takes_inputs was False, is now True"),
    ],
)
def test_other_arguments_cannot_resume(
    tiny_pipeline: DDIMPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    _interrupt(tiny_pipeline, tmp_path / "set", monkeypatch, after=1)
    before = _files(tmp_path / "set")
    with pytest.raises(CalibrationError, match=message):
        calibration.collect(tiny_pipeline, tmp_path / "set", **OPTIONS | changes)
    assert _files(tmp_path / "set") == before


def test_another_model_or_sampler_cannot_resume(
    tiny_pipeline: DDIMPipeline, saved_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tiny_pipeline, tmp_path / "set", monkeypatch, after=1)
    other = calibration.load_pipeline(saved_pipeline)
    with torch.no_grad():
        other.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(CalibrationError, match="fingerprint was [0-9a-f]{12}…, is now [0-9a-f]{12}…"):
        calibration.collect(other, tmp_path / "set", **OPTIONS)
    other = calibration.load_pipeline(saved_pipeline)
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, clip_sample=True)
    with pytest.raises(CalibrationError, match="scheduler_config.clip_sample was False, is now True"):
        calibration.collect(other, tmp_path / "set", **OPTIONS)


def test_other_inputs_cannot_resume(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [{"eta": eta} for eta in (0.0, 0.1, 0.2, 0.3)]
    _interrupt(tiny_pipeline, tmp_path / "set", monkeypatch, after=2, inputs=inputs)
    with pytest.raises(
        CalibrationError, match="`inputs` for sample-batch 1 differ from those of its finished shard"
    ):
        calibration.collect(tiny_pipeline, tmp_path / "set", **OPTIONS, inputs=[inputs[0], *inputs])
    calibration.collect(tiny_pipeline, tmp_path / "resumed", **OPTIONS, inputs=inputs)
    calibration.collect(tiny_pipeline, tmp_path / "set", **OPTIONS, inputs=inputs)
    assert _files(tmp_path / "set") == _files(tmp_path / "resumed")


def test_a_finished_set_is_not_overwritten(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    calibration.collect(tiny_pipeline, tmp_path / "set", **OPTIONS)
    before = _files(tmp_path / "set")
    with pytest.raises(
        CalibrationError,
        match="holds a finished calibration; use it with `errata compress` or errata.calibration.load",
    ):
        calibration.collect(tiny_pipeline, tmp_path / "set", **OPTIONS)
    assert _files(tmp_path / "set") == before


def test_a_place_that_is_taken_or_closed_is_refused(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    for out, message in (
        (file, "`.*file` exists and is not a directory; choose another directory"),
        (file / "below", "cannot write to `.*below`: not a directory; free"),
        (full, r"`.*full` is not empty and holds other files .*\(thesis.txt\); move them"),
    ):
        with pytest.raises(CalibrationError, match=message) as caught:
            calibration.collect(tiny_pipeline, out, **OPTIONS)
        assert "\n" not in str(caught.value)
    assert file.read_text() == "mine"
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_a_full_disk_is_one_clear_line_and_can_be_resumed(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def fill_up(journal: Journal, index: int, *args: Any, **kwargs: Any) -> Any:
        if index == 1:
            raise OSError(28, "No space left on device")
        return write_shard(journal, index, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("errata.calibration.document.write_shard", fill_up)
        with pytest.raises(CalibrationError, match="cannot write to `.*`: no space left on device"):
            calibration.collect(tiny_pipeline, tmp_path / "set", **OPTIONS)
    calibration.collect(tiny_pipeline, tmp_path / "set", **OPTIONS).verify()


def test_a_failure_before_the_first_shard_leaves_an_existing_directory_empty(
    tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="refused its arguments"):
        calibration.collect(tiny_pipeline, tmp_path, **OPTIONS, inputs=[{"zeta": 1}] * 4)
    assert list(tmp_path.iterdir()) == []


def test_two_do_not_record_into_the_same_directory(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tiny_pipeline, tmp_path / "set", monkeypatch, after=1)
    other = FileLock(tmp_path / "set" / ".lock")
    with pytest.raises(
        CalibrationError, match="another process is writing to `.*set` .*; wait until it ends"
    ):
        calibration.calibrate(tiny_pipeline, tmp_path / "set", **OPTIONS)
    other.release()
    calibration.calibrate(tiny_pipeline, tmp_path / "set", **OPTIONS).verify()


def test_a_request_without_a_finished_shard_gives_way(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt(tiny_pipeline, tmp_path / "set", monkeypatch, after=0)
    assert (tmp_path / "set" / PARTIAL).is_file()
    assert calibration.calibrate(tiny_pipeline, tmp_path / "set", **OPTIONS | {"seed": 4}).seed == 4


def test_the_older_name_is_the_same_function() -> None:
    assert calibration.collect is calibration.calibrate
