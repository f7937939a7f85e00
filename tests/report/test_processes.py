"""Several processes share a report: gloo on the CPU, started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from errata.deploy import DeployedPipeline
from errata.report import Reference, Report, merge
from errata.report.sharding import Workers
from errata.report.store import MeasurementStore

TIMED = (
    *("seconds_per_image", "overhead", "compute", "verdict", "front", "rivals", "peak_bytes"),
    "joules_per_image",
)


def command(artifact: Path, out: Path) -> list[str]:
    reference = str(artifact.parent / "reference.npz")
    words = ["report", str(artifact), "--reference", reference, "--features", "four_means:FourMeans"]
    sizes = [
        "--samples",
        "14",
        "--batch-size",
        "4",
        "--resamples",
        "20",
        "--at",
        "all",
        "--no-compute-matched",
    ]
    return [*words, *sizes, "--out", str(out)]


def start(launcher: list[str], artifact: Path, out: Path) -> str:
    environment = os.environ | {"PYTHONPATH": f"{artifact.parent}:{os.environ.get('PYTHONPATH', '')}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(
        [*launcher, "-m", "errata.cli", *command(artifact, out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(out: Path) -> list[dict[str, Any]]:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return [{name: value for name, value in row.items() if name not in TIMED} for row in report["rows"]]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(exported: Path, tmp_path: Path) -> None:
    start([sys.executable], exported, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    said = start(torchrun, exported, tmp_path / "two")
    assert said.count("report: ") == 1  # one of them speaks
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    assert rows(tmp_path / "one")[0]["samples"] == 14


def test_shares_of_processes_and_shards_are_disjoint() -> None:
    from errata.report.sharding import Shard

    class Two(Workers):
        def __init__(self, index: int) -> None:
            super().__init__(on_cpu=True)
            self._index = index

        index = property(lambda self: self._index)  # type: ignore[assignment]
        count = property(lambda self: 2)  # type: ignore[assignment]

    taken = [batch for i in range(2) for shard in range(3) for batch in Two(i).batches(Shard(shard, 3), 13)]
    assert sorted(taken) == list(range(13))


def test_merging_reads_no_model(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata import report

    first = report.run({"mine": deployed}, {}, reference, tmp_path / "out", samples=8, resamples=10)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("no image is sampled or looked at")

    for name in ("errata.correct.sampling._timed", "errata.quality.reference.Reference.features"):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr(MeasurementStore, "write", refuse)
    again = merge([tmp_path / "out"], tmp_path / "again", resamples=10)
    assert again.rows == first.rows
    assert isinstance(again, Report)
