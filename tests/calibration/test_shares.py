"""Shares of a calibration set add up to the bytes that one process writes, however they were recorded."""

import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline
from forked import ForkServer

from errata import CalibrationError, calibration, cli
from errata.calibration import Shard
from errata.calibration import merging as merging_module
from errata.calibration.document import PARTIAL
from errata.calibration.given import given_batches
from errata.calibration.shards import write_shard
from errata.calibration.shares import RULES, ShardRecord, Workers
from errata.journal import Journal

# Four sample-batches, the last one smaller.
OPTIONS: dict[str, Any] = {"num_inference_steps": 3, "num_samples": 7, "batch_size": 2, "seed": 3}

COMPRESS = ["--recipe", "w8a8", "--out", "unused"]


class _Killed(BaseException):
    """Stands in for a kill that leaves no time to clean up."""


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


def record(pipe: Any, out: Path, index: int, count: int, **changes: Any) -> None:
    calibration.record_share(pipe, out, shard=Shard(index, count), **OPTIONS | changes)


@pytest.fixture(scope="module")
def whole(tiny_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("whole") / "set"
    calibration.calibrate(tiny_pipeline, out, **OPTIONS)
    return out


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_in_one_directory_add_up_in_any_order(
    tiny_pipeline: DDIMPipeline, whole: Path, tmp_path: Path, count: int
) -> None:
    out = tmp_path / "set"
    for index in reversed(range(count)):
        record(tiny_pipeline, out, index, count)
    merged = calibration.merge([out], out)
    assert files(out) == files(whole)
    merged.verify()
    assert (merged.num_samples, merged.num_steps) == (7, 3)


def test_shares_in_directories_of_their_own_add_up(
    tiny_pipeline: DDIMPipeline, whole: Path, tmp_path: Path
) -> None:
    parts = [tmp_path / f"part{index}" for index in range(3)]
    for index, part in enumerate(parts):
        record(tiny_pipeline, part, index, 3)
    before = [files(part) for part in parts]
    calibration.merge(parts, tmp_path / "new" / "set")
    assert files(tmp_path / "new" / "set") == files(whole)
    assert [files(part) for part in parts] == before
    calibration.merge([parts[1], parts[0], parts[2]], parts[0])
    assert files(parts[0]) == files(whole)
    assert files(parts[1]) == before[1]


def test_directories_of_machines_can_be_copied_into_one(
    tiny_pipeline: DDIMPipeline, whole: Path, tmp_path: Path
) -> None:
    for index in range(2):
        record(tiny_pipeline, tmp_path / str(index), index, 2)
    shutil.copytree(tmp_path / "1", tmp_path / "0", dirs_exist_ok=True)
    calibration.merge([tmp_path / "0"], tmp_path / "0")
    assert files(tmp_path / "0") == files(whole)


def test_prompts_and_plain_inputs_are_kept(guided_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    options = OPTIONS | {
        "prompts": list("abcdefg"),
        "guidance_scale": 2.5,
        "inputs": [{"class_labels": torch.tensor([0] * size)} for size in (2, 2, 2, 1)],
    }
    plain = options | {"inputs": [{"unguided_steps": 0}] * 4}
    for name, given in (("tensors", options), ("plain", plain)):
        calibration.calibrate(guided_pipeline(), tmp_path / name, **given)
        out = tmp_path / f"{name}-shared"
        for index in range(3):
            calibration.record_share(guided_pipeline(), out, shard=Shard(index, 3), **given)
        calibration.merge([out], out)
        assert files(out) == files(tmp_path / name)
    assert calibration.load(tmp_path / "plain-shared").arguments() is not None


def test_a_share_draws_every_mapping_and_digests_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[Any] = []

    def digest(mapping: Mapping[str, Any], *, name: str) -> str:
        digested.append(mapping["number"])
        return "digest"

    monkeypatch.setattr("errata.calibration.given.value_digest", digest)
    mappings = ({"number": number} for number in range(9))
    found = [index for index, _ in given_batches(mappings, 5, range(1, 5, 2))]
    assert (found, digested, next(mappings)["number"]) == ([1, 3], [1, 3], 5)
    with pytest.raises(CalibrationError, match="`inputs` has 2 entries, 5 are needed"):
        list(given_batches(iter([{"number": 0}] * 2), 5, range(0, 5, 5)))


def stop_at(monkeypatch: pytest.MonkeyPatch, fatal: int, name: str) -> None:
    """Stop as a kill would, before a shard or before its record is written."""
    original = {"document.write_shard": write_shard, "shares.ShardRecord.write": None}[name]

    def stop(owner: Any, index_or_root: Any, *args: Any, **kwargs: Any) -> Any:
        index = index_or_root if original else args[0]
        if index == fatal:
            raise _Killed
        return write_shard(owner, index_or_root, *args, **kwargs)

    monkeypatch.setattr(f"errata.calibration.{name}", stop)


@pytest.mark.parametrize("place", ["document.write_shard", "shares.ShardRecord.write"])
def test_a_share_that_broke_off_is_made_good(
    tiny_pipeline: DDIMPipeline,
    whole: Path,
    count_calls: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    out = tmp_path / "set"
    record(tiny_pipeline, out, 1, 2)
    with monkeypatch.context() as patch:
        stop_at(patch, 0 if place.endswith("Record.write") else 2, place)
        with pytest.raises(_Killed):
            record(tiny_pipeline, out, 0, 2)
    (out / "shards" / ".00002.safetensors.0123456789ab.partial").write_bytes(b"half a sha")
    with pytest.raises(CalibrationError, match="sample-batches are missing .* record the shards 0/2 again"):
        calibration.merge([out], out)
    count_calls.clear()
    record(tiny_pipeline, out, 0, 2)
    assert len(count_calls) == 3 * (2 if place.endswith("Record.write") else 1)
    calibration.merge([out], out)
    assert files(out) == files(whole)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_share_is_made_good(
    tiny_pipeline: DDIMPipeline, saved_pipeline: Path, whole: Path, tmp_path: Path, forked: ForkServer
) -> None:
    script = f"""
import os, signal
import torch
from errata import calibration
torch.set_num_threads({torch.get_num_threads()})
pipe = calibration.load_pipeline({str(saved_pipeline)!r})
calls = []
def die(*_):
    calls.append(1)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
pipe.unet.register_forward_hook(die)
calibration.record_share(pipe, {str(tmp_path / "set")!r}, shard=calibration.Shard(0, 2), **{OPTIONS!r})
"""
    ended = forked.run(script)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    for index in (1, 0):
        record(tiny_pipeline, tmp_path / "set", index, 2)
    calibration.merge([tmp_path / "set"], tmp_path / "set")
    assert files(tmp_path / "set") == files(whole)


def test_damage_is_recorded_again(
    tiny_pipeline: DDIMPipeline,
    whole: Path,
    count_calls: list[int],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "set"
    record(tiny_pipeline, out, 0, 1)
    altered = bytearray((out / "shards" / "00001.safetensors").read_bytes())
    altered[-1] ^= 1
    (out / "shards" / "00001.safetensors").write_bytes(altered)
    before = files(out)
    with pytest.raises(CalibrationError, match=r"00001.safetensors` \(sample-batch 1\) is missing or was"):
        calibration.merge([out], out)
    (out / "records" / "00003.json").write_bytes(b"{")
    with pytest.raises(CalibrationError, match="00003.json` is damaged: .*; run the `errata cal"):
        calibration.merge([out], out)
    assert files(out).keys() == before.keys()
    count_calls.clear()
    record(tiny_pipeline, out, 0, 1)
    assert len(count_calls) == 2 * 3
    assert "sample-batch 1 in" in caplog.text
    calibration.merge([out], out)
    assert files(out) == files(whole)


def test_missing_shares_are_named_before_anything_is_written(
    tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    record(tiny_pipeline, tmp_path / "part", 1, 3)
    before = files(tmp_path / "part")
    for out in (tmp_path / "part", tmp_path / "new" / "set"):
        with pytest.raises(
            CalibrationError,
            match=r"3 of 4 sample-batches are missing in `.*part` \(numbers 0, 2, 3, from 0\); record the "
            r"shards 0/3, 2/3 again, by the same `errata calibrate` with --shard",
        ):
            calibration.merge([tmp_path / "part"], out)
    assert files(tmp_path / "part") == before
    assert not (tmp_path / "new").exists()
    record(tiny_pipeline, tmp_path / "part", 0, 2)
    with pytest.raises(
        CalibrationError, match="1 of 4 .* with --shard I/N, sample-batch b belongs to share b"
    ):
        calibration.merge([tmp_path / "part"], tmp_path / "part")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "seed was 3, is now 4"),
        ({"num_samples": 8}, "num_samples was 7, is now 8"),
        ({"inputs": [{"eta": 0.5}] * 4}, "takes_inputs was False, is now True"),
    ],
)
def test_foreign_shares_are_refused(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    record(tiny_pipeline, one, 0, 2)
    record(tiny_pipeline, two, 1, 2, **changes)
    before = files(one), files(two)
    with pytest.raises(
        CalibrationError,
        match=f"`.*two` holds shares of another calibration than `.*one`: {message}; leave it out, or record",
    ):
        calibration.merge([one, two], out)
    with pytest.raises(CalibrationError, match=f"shares of a calibration of another request: {message}"):
        record(tiny_pipeline, one, 1, 2, **changes)
    assert (files(one), files(two)) == before
    assert not out.exists()


def test_the_same_batch_with_other_contents_is_refused(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    record(tiny_pipeline, one, 0, 1)
    shutil.copytree(one, two)
    read = ShardRecord.read(two, 2)
    assert read is not None
    replace(read, shard=replace(read.shard, sha256="0" * 64)).write(two, 2)  # other hardware, as it were
    with pytest.raises(CalibrationError, match="sample-batch 2 differs between `.*one` and `.*two`"):
        calibration.merge([one, two], tmp_path / "set")


def test_shares_with_other_calls_are_refused(guided_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    options = OPTIONS | {"prompts": list("abcdefg")}
    inputs = [{"guidance_scale": scale} for scale in (1.0, 2.0, 1.0, 1.0)]
    out = tmp_path / "set"
    calibration.record_share(guided_pipeline(), out, shard=Shard(0, 2), inputs=inputs, **options)
    with pytest.raises(CalibrationError, match="sample-batch 1 made other UNet calls .*rows_per_sample was"):
        calibration.record_share(guided_pipeline(), out, shard=Shard(1, 2), inputs=inputs, **options)
    other = tmp_path / "other"
    with pytest.raises(CalibrationError, match="sample-batch 3 made other UNet calls"):
        calibration.record_share(guided_pipeline(), other, shard=Shard(1, 2), inputs=inputs, **options)
    inputs[3] = {"guidance_scale": 2.0}
    calibration.record_share(guided_pipeline(), other, shard=Shard(1, 2), inputs=inputs, **options)
    with pytest.raises(CalibrationError, match="sample-batch 1 made other UNet calls"):
        calibration.merge([out, other], tmp_path / "merged")


def test_one_process_finishes_what_shares_began(
    tiny_pipeline: DDIMPipeline, whole: Path, count_calls: list[int], tmp_path: Path
) -> None:
    record(tiny_pipeline, tmp_path / "set", 1, 4)
    with pytest.raises(CalibrationError, match="holds shares of a calibration; once all are recorded"):
        calibration.load(tmp_path / "set")
    count_calls.clear()
    calibration.calibrate(tiny_pipeline, tmp_path / "set", **OPTIONS)
    assert len(count_calls) == 3 * 3
    assert files(tmp_path / "set") == files(whole)
    for again in (
        lambda: record(tiny_pipeline, tmp_path / "set", 0, 2),
        lambda: calibration.merge([tmp_path / "set"], tmp_path / "set"),
    ):
        with pytest.raises(CalibrationError, match="holds a finished calibration"):
            again()


def test_what_one_process_began_is_not_shared(
    tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(journal: Journal, index: int, *args: Any, **kwargs: Any) -> Any:
        if index == 1:
            raise _Killed
        return write_shard(journal, index, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("errata.calibration.document.write_shard", stop)
        with pytest.raises(_Killed):
            calibration.calibrate(tiny_pipeline, tmp_path / "set", **OPTIONS)
    assert (tmp_path / "set" / PARTIAL).is_file()
    with pytest.raises(CalibrationError, match="unfinished calibration of a single process; finish it with"):
        record(tiny_pipeline, tmp_path / "set", 0, 2)


def test_a_merge_that_was_killed_while_it_cleans_up_is_finished(
    tiny_pipeline: DDIMPipeline, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: Path) -> None:
        raise _Killed

    out = tmp_path / "set"
    record(tiny_pipeline, out, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(merging_module, "_remove_shares", stop)
        with pytest.raises(_Killed):
            calibration.merge([out], out)
    assert (out / RULES.request).is_file()
    calibration.merge([out], out).verify()
    assert files(out) == files(whole)


def test_places_that_do_not_fit_are_refused(tiny_pipeline: DDIMPipeline, whole: Path, tmp_path: Path) -> None:
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    for folder in (empty, full):
        folder.mkdir()
    for path in (file, full / "thesis.txt"):
        path.write_text("mine")
    with pytest.raises(CalibrationError, match="there is nothing to merge"):
        calibration.merge([], tmp_path / "set")
    with pytest.raises(CalibrationError, match="`.*empty` holds no shares of a calibration; give the --out"):
        calibration.merge([empty], tmp_path / "set")
    with pytest.raises(CalibrationError, match=r"holds other files .*\(thesis.txt\)"):
        record(tiny_pipeline, full, 0, 1)
    with pytest.raises(CalibrationError, match="`.*file` exists and is not a directory"):
        record(tiny_pipeline, file, 0, 1)
    record(tiny_pipeline, tmp_path / "shares", 0, 1)
    with pytest.raises(CalibrationError, match="`.*full` exists and is not empty"):
        calibration.merge([tmp_path / "shares"], full)
    assert (full / "thesis.txt").read_text() == file.read_text() == "mine"
    with pytest.raises(CalibrationError, match="`.*set` holds a finished calibration; there is nothing to m"):
        calibration.merge([whole], tmp_path / "out")
    request = tmp_path / "shares" / RULES.request
    request.write_bytes(request.read_bytes().replace(b'"prompts":null', b'"prompts":["x"]', 1))
    with pytest.raises(CalibrationError, match="is damaged: its prompts were altered; record it again"):
        calibration.merge([tmp_path / "shares"], tmp_path / "set")


def test_bad_shards_are_errors_of_calibration() -> None:
    with pytest.raises(CalibrationError, match="shard 3/3: write I/N with I from 0 to N - 1, such as 3/16"):
        Shard(3, 3)
    with pytest.raises(CalibrationError, match="shard `x`: write I/N"):
        Shard.parse("x")


def test_processes_of_one_job_share_and_the_first_one_finishes(
    tiny_pipeline: DDIMPipeline, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes one after the other; where both would wait, the second one's work is done first."""
    out, waits = tmp_path / "set", iter(range(9))

    class Two(Workers):
        def __init__(self, *, on_cpu: bool) -> None:
            self._state = None
            self.number = next(numbers)

        index = property(lambda self: self.number)  # type: ignore[assignment]
        count = property(lambda self: 2)  # type: ignore[assignment]

        def wait(self) -> None:
            if self.number == 0 and next(waits) == 0:
                with pytest.raises(CalibrationError, match="holds shares of a calibration"):
                    calibration.calibrate(tiny_pipeline, out, **OPTIONS)

    numbers = iter((0, 1))
    monkeypatch.setattr("errata.calibration.collection.Workers", Two)
    calibration.calibrate(tiny_pipeline, out, **OPTIONS).verify()
    assert files(out) == files(whole)


@pytest.mark.slow
def test_torchrun_gives_what_one_process_gives(
    saved_pipeline: Path, whole: Path, tmp_path: Path, forked: ForkServer
) -> None:
    sizes = ["--steps", "3", "--samples", "7", "--batch-size", "2", "--seed", "3", "--device", "cpu"]
    torchrun = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
    started = ["--nproc-per-node", "2", "--standalone", "-m", "errata.cli"]
    command = ["calibrate", str(saved_pipeline), *sizes, "--out", str(tmp_path / "set")]
    ended = forked.run(torchrun, *started, *command)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("calibration: ") == 1  # one of them speaks
    assert files(tmp_path / "set") == files(whole)


def test_the_command_records_shares_and_merges_them(
    saved_pipeline: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--steps", "3", "--samples", "7", "--batch-size", "2", "--seed", "3", "--device", "cpu"]
    parts = [str(tmp_path / f"part{index}") for index in range(2)]
    for index, part in enumerate(parts):
        command = ["calibrate", str(saved_pipeline), *sizes, "--out", part, "--shard", f"{index}/2"]
        assert cli.main(command) == 0
        assert f"shard {index}/2 is recorded in {part}; make the set with" in capsys.readouterr().out
    assert cli.main(["compress", str(saved_pipeline), *COMPRESS, "--calibration", parts[0]]) == 1
    told = capsys.readouterr().err
    assert "holds shares of a calibration; once all are recorded, make the set of them with `errata" in told
    assert "errata.calibration" not in told
    out = str(tmp_path / "set")
    assert cli.main(["calibrate", "--merge", parts[0], "--out", out]) == 1
    assert "record the shards 1/2 again" in capsys.readouterr().err
    assert not Path(out).exists()
    assert cli.main(["calibrate", "--merge", *parts, "--out", out]) == 0
    assert capsys.readouterr().out == f"calibration: {out}, 7 trajectories of 3 steps\n"
    assert files(Path(out)) == files(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "PIPELINE is missing; give a hub name or a folder, or --merge DIR"),
        (
            ["x", "--merge", "y"],
            "--merge reads recorded shards only; leave out PIPELINE, --shard and --dry-run",
        ),
        (["--shard", "0/2", "--merge", "y"], "--merge reads recorded shards only"),
        (["x", "--shard", "2/2"], "shard 2/2: write I/N with I from 0 to N - 1, such as 3/16"),
    ],
)
def test_options_that_do_not_fit_are_misuse(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["calibrate", *options, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
