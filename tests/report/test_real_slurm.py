"""The Slurm scripts on a real Slurm, of one node on this machine: a task that is killed is made good."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMPipeline
from slurm import Slurm
from slurm import slurm as slurm

from errata import calibration, cli

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "cluster"
# Measured anew by every run.
TIMED = ("seconds_per_image", "overhead", "compute", "verdict", "front", "rivals", "peak_bytes")
# As `four_means.py` of the artifact, but slow enough to be killed in the middle.
SLOW_MEANS = """
import os, time
from four_means import FourMeans

class SlowMeans(FourMeans):
    def forward(self, images):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return super().forward(images)
"""


def submit(slurm: Slurm, script: str, *arguments: str, **environment: str) -> tuple[str, ...]:
    """Start a script as a user does, with one thread in place of eight; return the numbers of its jobs."""
    mine = slurm.folder / script
    text = (EXAMPLES / script).read_text(encoding="utf-8")
    assert text.count("--cpus-per-task=8") == 1
    mine.write_text(text.replace("--cpus-per-task=8", "--cpus-per-task=1"), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{slurm.environment['PATH']}"
    done = subprocess.run(
        ["bash", str(mine), *arguments],
        env=slurm.environment | {"PATH": path} | environment,
        cwd=slurm.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return tuple(re.findall(r"(?:job|array) (\d+)", done.stdout))


def wait_until(is_so: Callable[[], bool], slurm: Slurm, *, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"too slow\n{slurm.told()}"
        time.sleep(0.05)


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


@pytest.mark.slow
def test_a_calibration_task_that_was_killed_is_made_good_by_the_same_line(
    slurm: Slurm, tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    out = tmp_path / "set"
    sizes = ["--steps", "150", "--samples", "11", "--batch-size", "1", "--device", "cpu"]
    line = [str(tmp_path / "pipeline"), *sizes]
    array, merged = submit(slurm, "calibrate.sbatch", *line, OUT=str(out), SHARDS="2")
    wait_until((out / "records" / "00001.json").is_file, slurm)
    for process in slurm.processes_of(1):
        os.kill(process, signal.SIGKILL)
    assert slurm.wait_for(f"{array}_1", "FAILED", "COMPLETED") == "FAILED", slurm.told()
    assert slurm.wait_for(f"{array}_0", "COMPLETED", "FAILED") == "COMPLETED", slurm.told()
    assert slurm.wait_for(merged, "CANCELLED", "COMPLETED") == "CANCELLED"  # and does not wait for ever
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("[0-9]*")}
    assert 7 <= len(kept) < 11
    _, merged = submit(slurm, "calibrate.sbatch", *line, OUT=str(out), SHARDS="2")
    assert slurm.wait_for(merged, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", slurm.told()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    whole = calibration.calibrate(
        calibration.load_pipeline(tmp_path / "pipeline"),
        tmp_path / "whole",
        num_inference_steps=150,
        num_samples=11,
        batch_size=1,
    )
    assert files(out) == files(whole.path)


@pytest.mark.slow
def test_a_report_task_that_was_preempted_goes_on_by_itself(
    slurm: Slurm, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (exported.parent / "slow_means.py").write_text(SLOW_MEANS, encoding="utf-8")
    out, measured = tmp_path / "report", tmp_path / "report" / "measurements"
    asked = ["--reference", str(exported.parent / "reference.npz"), "--features", "slow_means:SlowMeans"]
    asked += [
        "--samples",
        "30",
        "--batch-size",
        "4",
        "--at",
        "all",
        "--no-compute-matched",
        "--device",
        "cpu",
    ]
    paths = {"PYTHONPATH": str(exported.parent), "OUT": str(out)}
    _, array, merged = submit(slurm, "report.sbatch", str(exported), *asked, **paths, SHARDS="2", PAUSE="0.7")
    assert slurm.wait_for(f"{array}_1", "RUNNING") == "RUNNING"
    before = len(list(measured.glob("*/*.safetensors")))
    wait_until(lambda: len(list(measured.glob("*/*.safetensors"))) > before + 1, slurm)
    assert slurm.ask("scontrol", "requeue", f"{array}_1") == ""
    assert slurm.wait_for(f"{array}_1", "COMPLETED", "FAILED") == "COMPLETED", slurm.told()
    assert "Restarts=1" in slurm.ask("scontrol", "show", "job", f"{array}_1")
    assert slurm.wait_for(merged, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", slurm.told()
    monkeypatch.syspath_prepend(exported.parent)
    assert cli.main(["report", str(exported), *asked, "--out", str(tmp_path / "one")]) == 0
    assert rows(out) == rows(tmp_path / "one")


def rows(out: Path) -> list[dict[str, Any]]:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return [
        {name: value for name, value in row.items() if name not in (*TIMED, "joules_per_image")}
        for row in report["rows"]
    ]
