"""Several processes share a report: gloo on the CPU, started by torchrun."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from forked import COMMAND, ForkServer, Program

from errata import cli
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


# `torchrun`, and what it starts: leaves its environment to a fork that does the work, and waits for that.
TORCHRUN = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
STAND_IN = """
import json, os, sys, time
from pathlib import Path
told, status = (Path(sys.argv[1]) / f"{os.environ['RANK']}.{name}" for name in ("json", "status"))
told.with_suffix(".part").write_text(json.dumps(dict(os.environ)))
told.with_suffix(".part").rename(told)
while not status.exists():
    time.sleep(0.02)
sys.exit(int(status.read_text()))
"""


def start(forked: ForkServer, told: Path, words: list[str], features: Path) -> Program:
    """The command in place of the process of `torchrun` that left its environment in that file."""
    deadline = time.monotonic() + 120
    while not told.exists():
        assert time.monotonic() < deadline, "torchrun started no process"
        time.sleep(0.02)
    environment = json.loads(told.read_text(encoding="utf-8"))
    return forked.start(COMMAND, *words, environment=environment | {"PYTHONPATH": str(features)})


def rows(out: Path) -> list[dict[str, Any]]:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return [{name: value for name, value in row.items() if name not in TIMED} for row in report["rows"]]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    exported: Path, tmp_path: Path, forked: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.syspath_prepend(exported.parent)
        assert cli.main(command(exported, tmp_path / "one")) == 0
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    options = ["--nproc-per-node", "2", "--standalone", tmp_path / "stand_in.py", tmp_path]
    torchrun = forked.start(TORCHRUN, *options)
    words = command(exported, tmp_path / "two")
    both = [start(forked, tmp_path / f"{rank}.json", words, exported.parent) for rank in range(2)]
    for rank, process in enumerate(both):
        process.wait()
        (tmp_path / "part").write_text(str(process.returncode), encoding="utf-8")
        (tmp_path / "part").rename(tmp_path / f"{rank}.status")
        assert process.returncode == 0, process.stderr
    assert torchrun.wait() == 0, torchrun.stderr
    said = "".join(process.stdout for process in both)
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
