"""The Ray examples on a real Ray, on this machine with two workers: one is killed, and made good."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from diffusers import DDIMPipeline

from errata import calibration

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "cluster"
# As `four_means.py` of the artifact, but slow enough to be killed in the middle.
SLOW_MEANS = """
import time
from four_means import FourMeans

class SlowMeans(FourMeans):
    def forward(self, images):
        time.sleep(0.3)
        return super().forward(images)
"""
ONE_WORKER = """
import sys
sys.path.insert(0, {folder!r})
import report_ray
from errata import deploy, report
from errata.quality import open_network
from slow_means import SlowMeans
deployed = deploy.load({artifact!r}, device="cpu")
reference = report.Reference.open({reference!r}, SlowMeans())
report.run(
    {{"artifact": deployed}}, report_ray.PLANS, reference, {out!r}, samples=26, batch_size=4,
)
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """What Ray is started with: two processors, and files in a folder of its own."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("needs ray: pip install ray")
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a socket's path is short
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield kept | {
        "HOME": str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}',
    }
    shutil.rmtree(folder, ignore_errors=True)


def children(pid: int) -> list[int]:
    """Return the processes below a process, with those below them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = int(status.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            if parent == pid:
                child = int(status.parent.name)
                found += [child, *children(child)]
    return found


def at_work(driver: int, task: str) -> list[int]:
    """Return the workers of a driver that run a task."""
    title = f"ray::{task}".encode()
    found = []
    for pid in children(driver):
        with suppress(OSError):
            if (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(title):
                found.append(pid)
    return found


def run_and_kill(
    script: str, arguments: list[str], environment: dict[str, str], *, task: str, when: Callable[[], bool]
) -> str:
    """Run an example, kill one of its workers when it is time, and return what the example told."""
    log = Path(environment["HOME"]) / "told"
    command = [sys.executable, str(FOLDER / script), *arguments]
    with log.open("wb") as output:
        driver = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 240
        while not when():
            assert driver.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.05)
        workers = at_work(driver.pid, task)
        assert workers, log.read_text(errors="replace")
        os.kill(workers[0], signal.SIGKILL)
        assert driver.wait(timeout=240) == 0, log.read_text(errors="replace")
    finally:
        driver.terminate()
        driver.wait(timeout=60)
    return log.read_text(encoding="utf-8", errors="replace")


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


@pytest.mark.slow
def test_a_killed_worker_of_a_calibration_is_made_good(
    environment: dict[str, str], tiny_pipeline: DDIMPipeline, tmp_path: Path
) -> None:
    pipeline, out = tmp_path / "pipeline", tmp_path / "set"
    tiny_pipeline.save_pretrained(pipeline)
    sizes = ["--steps", "100", "--samples", "13", "--batch-size", "1", "--shares", "2"]
    told = run_and_kill(
        "calibrate_ray.py",
        [str(pipeline), *sizes, "--out", str(out)],
        environment,
        task="record_share",
        when=lambda: all((out / "records" / f"0000{index}.json").is_file() for index in range(2)),
    )
    assert "share 0 of 2 is recorded" in told
    assert "share 1 of 2 is recorded" in told
    whole = calibration.calibrate(
        calibration.load_pipeline(pipeline),
        tmp_path / "whole",
        num_inference_steps=100,
        num_samples=13,
        batch_size=1,
    )
    assert files(out) == files(whole.path)


@pytest.mark.slow
def test_a_killed_worker_of_a_report_is_made_good(
    environment: dict[str, str], exported: Path, tmp_path: Path
) -> None:
    (exported.parent / "slow_means.py").write_text(SLOW_MEANS, encoding="utf-8")
    environment["PYTHONPATH"] = str(exported.parent)
    reference, measured = str(exported.parent / "reference.npz"), tmp_path / "report" / "measurements"
    asked = ["--reference", reference, "--features", "slow_means:SlowMeans", "--samples", "26"]
    asked += ["--batch-size", "4", "--shares", "2", "--out", str(tmp_path / "report")]
    told = run_and_kill(
        "report_ray.py",
        [str(exported), *asked],
        environment,
        task="measure_share",
        when=lambda: any(measured.glob("*/000002-*.safetensors")),
    )
    assert "share 0 of 2 is measured" in told
    assert "share 1 of 2 is measured" in told
    program = ONE_WORKER.format(
        folder=str(FOLDER), artifact=str(exported), reference=reference, out=str(tmp_path / "one")
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared, one = distances(tmp_path / "report"), distances(tmp_path / "one")
    assert shared == one
    assert {"none", "iec", "free", "middle in full"} <= set(one)


def distances(out: Path) -> dict[str, object]:
    """Return the Fréchet distances of the plans; compute-matched rows are chosen by measured times."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return {row["plan"]: row["frechet"] for row in report["rows"] if row["role"] != "equal compute"}
