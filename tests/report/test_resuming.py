"""A run that was stopped goes on, shares add up, and both give what one run gives."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forked import ForkServer, Program

from errata import cli
from errata.correct import IEC, Plan
from errata.deploy import DeployedPipeline
from errata.errors import ReportError
from errata.report import Reference, Report, Shard, measure, merge, run
from errata.report.store import MeasurementStore

PLANS = {"first": Plan(IEC(), "first:1"), "all": Plan(IEC(), "all")}
OPTIONS: dict[str, Any] = {"samples": 10, "batch_size": 2, "seed": 3, "shown": 3}
# Of a run in a process of its own: samples slowly, so that it can be killed in the middle.
SCRIPT = """
import sys, time
from errata import cli
from errata.correct import sampling
timed = sampling._timed
def slowly(*args):
    time.sleep(float(sys.argv[1]))
    return timed(*args)
sampling._timed = slowly
sys.exit(cli.main(sys.argv[2:]))
"""
# What may differ between two runs of the same thing.
TIMES = {
    *("date", "seconds_per_image", "measured", "spread", "costs", "compute", "sampling_seconds", "command"),
    *("promised_seconds", "peak_bytes", "defined", "verdict", "front", "rivals", "notes", "machine"),
}


def numbers(value: Any) -> Any:
    """A report's JSON without what was timed."""
    if isinstance(value, dict):
        return {name: numbers(each) for name, each in value.items() if name not in TIMES}
    return [numbers(each) for each in value] if isinstance(value, list) else value


def rows_of(report: Report) -> Any:
    return numbers([row.to_json() for row in report.rows])


def files(out: Path) -> dict[str, bytes]:
    folder = out / "measurements"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(
    deployed: DeployedPipeline, reference: Reference, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return run({"mine": deployed}, PLANS, reference, out, resamples=20, **OPTIONS), out


def test_what_is_there_is_not_measured_again(
    whole: tuple[Report, Path],
    deployed: DeployedPipeline,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, out = whole
    before = files(out)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to sample")

    monkeypatch.setattr("errata.correct.sampling._timed", refuse)
    again = run({"mine": deployed}, PLANS, reference, out, resamples=20, **OPTIONS)
    assert again.to_json()["rows"] == report.to_json()["rows"]
    assert files(out) == before


def test_a_run_that_broke_off_goes_on(
    whole: tuple[Report, Path],
    deployed: DeployedPipeline,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[str] = []
    write = MeasurementStore.write

    def write_some(self: MeasurementStore, row: str, batch: int, measured: Any) -> None:
        if len(written) == 17:
            raise KeyboardInterrupt
        written.append(row)
        write(self, row, batch, measured)

    with monkeypatch.context() as patched:
        patched.setattr(MeasurementStore, "write", write_some)
        with pytest.raises(KeyboardInterrupt):
            run({"mine": deployed}, PLANS, reference, tmp_path / "out", resamples=20, **OPTIONS)
    assert not (tmp_path / "out" / "report.json").exists()
    with pytest.raises(ReportError, match="of 5 batches are not complete"):
        merge([tmp_path / "out"], tmp_path / "out")
    report = run({"mine": deployed}, PLANS, reference, tmp_path / "out", resamples=20, **OPTIONS)
    assert same_rows(report, whole[0])


def same_rows(one: Report, other: Report) -> bool:
    """Which compute-matched rows there are follows from measured costs; all others must be equal."""
    asked = [[row for row in report.rows if row.role != "equal compute"] for report in (one, other)]
    shown = [numbers([row.to_json() for row in rows]) for rows in asked]
    return bool(shown[0] == shown[1])


def test_shards_add_up(
    whole: tuple[Report, Path], deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    options = {**OPTIONS, "compute_matched": False}
    for index in (2, 0, 1):
        measure({"mine": deployed}, PLANS, reference, tmp_path / "all", shard=Shard(index, 3), **options)
    assert same_rows(merge([tmp_path / "all"], tmp_path / "all", resamples=20), whole[0])
    for index in range(2):
        out = tmp_path / f"part{index}"
        measure({"mine": deployed}, PLANS, reference, out, shard=Shard(index, 2), **options)
    with pytest.raises(ReportError, match=r"2 of 5 batches are not complete \(numbers 1, 3, from 0\)"):
        merge([tmp_path / "part0"], tmp_path / "half")
    assert not (tmp_path / "half").exists()
    merged = merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "merged", resamples=20)
    assert same_rows(merged, whole[0])
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


def test_more_plans_and_more_samples_take_over_what_is_there(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path
) -> None:
    options = {**OPTIONS, "compute_matched": False, "resamples": 2}
    few = {"first": PLANS["first"]}
    run({"mine": deployed}, few, reference, tmp_path / "out", **{**options, "samples": 8})
    before = files(tmp_path / "out")
    report = run({"mine": deployed}, PLANS, reference, tmp_path / "out", **options)
    after = files(tmp_path / "out")
    assert [row.plan for row in report.rows] == ["none", "first", "all"]
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2 * 1 + 5


def test_other_settings_are_refused(
    whole: tuple[Report, Path], deployed: DeployedPipeline, reference: Reference
) -> None:
    _, out = whole
    with pytest.raises(
        ReportError, match="measurements of another request: seed was 3, is now 4; repeat that request"
    ):
        run({"mine": deployed}, PLANS, reference, out, **{**OPTIONS, "seed": 4})
    with pytest.raises(ReportError, match="of another request: batch_size was 2, is now 5; repeat"):
        run({"mine": deployed}, PLANS, reference, out, **{**OPTIONS, "batch_size": 5})


def test_damage_is_found(deployed: DeployedPipeline, reference: Reference, tmp_path: Path) -> None:
    options = {**OPTIONS, "compute_matched": False, "resamples": 2}
    run({"mine": deployed}, PLANS, reference, tmp_path / "out", **options)
    file = next((tmp_path / "out" / "measurements").rglob("000003-*.safetensors"))
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ReportError, match="is damaged .*; remove it and run the same command again"):
        merge([tmp_path / "out"], tmp_path / "out")
    index = tmp_path / "out" / "measurements" / "ledger.json"
    index.write_text("{}", encoding="utf-8")
    with pytest.raises(ReportError, match="ledger.json` is damaged"):
        merge([tmp_path / "out"], tmp_path / "out")
    with pytest.raises(ReportError, match="holds no measurements of `errata report`"):
        merge([tmp_path], tmp_path / "other")


def command(artifact: Path, out: Path) -> list[str]:
    reference = str(artifact.parent / "reference.npz")
    words = ["report", str(artifact), "--reference", reference, "--features", "four_means:FourMeans"]
    sizes = ["--samples", "12", "--batch-size", "2", "--at", "all", "--resamples", "20"]
    return [*words, *sizes, "--out", str(out)]


def reporting(forked: ForkServer, artifact: Path, out: Path, *, pause: float) -> Program:
    """`errata report` on the artifact in a process of its own."""
    environment = {"PYTHONPATH": str(artifact.parent)}
    return forked.start(SCRIPT, pause, *command(artifact, out), environment=environment)


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed(
    exported: Path, tmp_path: Path, forked: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.syspath_prepend(exported.parent)
        assert cli.main(command(exported, whole)) == 0
    killed = reporting(forked, exported, out, pause=0.2)
    deadline = time.monotonic() + 120
    while len(files(out)) < 12 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    done = files(out)
    assert not (out / "report.json").exists()
    resumed = reporting(forked, exported, out, pause=0)
    assert resumed.wait() == 0, resumed.stderr
    assert {name: files(out)[name] for name in done} == done
    one, other = (json.loads((place / "report.json").read_text()) for place in (whole, out))
    asked = [[row for row in each["rows"] if row["role"] != "equal compute"] for each in (one, other)]
    assert numbers(asked[0]) == numbers(asked[1])
    assert [row["samples"] for row in asked[1]] == [12, 12]
