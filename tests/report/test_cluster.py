"""The examples for clusters, without a cluster: their own code runs, the schedulers are imitated."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from diffusers import DDIMPipeline
from torch import Tensor, nn

from errata import cli
from errata.deploy import DeployedPipeline
from errata.report import Reference, run

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "cluster"
RECORDER = """#!{python}
import json, os, sys
from pathlib import Path
told = dict(name=Path(sys.argv[0]).name, arguments=sys.argv[1:], threads=os.environ.get("OMP_NUM_THREADS"))
with open({record!r}, "a") as file:
    file.write(json.dumps(told) + "\\n")
print(100 + len(open({record!r}).readlines()))
"""
ASKED = ["runs/a", "runs/with space", "--reference", "photos.npz", "--samples", "64"]


class BlockMeans(nn.Module):
    """What `four_means` holds."""

    name, channels = "block-means", 1

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@pytest.fixture
def example() -> ModuleType:
    return load("report_ray")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stands in for ray: a task runs when it is asked for. What tasks want is noted."""
    wanted: list[dict[str, Any]] = []

    def remote(**options: Any) -> Any:
        wanted.append(options)
        return lambda task: SimpleNamespace(remote=task)

    imitation: Any = ModuleType("ray")
    imitation.init = lambda: None
    imitation.remote = remote
    imitation.get = lambda found: found
    imitation.wait = lambda waiting: (waiting[:1], waiting[1:])
    monkeypatch.setitem(sys.modules, "ray", imitation)
    return wanted


def test_the_ray_example_gives_what_one_run_gives(
    example: ModuleType,
    ray: list[dict[str, Any]],
    exported: Path,
    deployed: DeployedPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(exported.parent)
    sizes = ["--samples", "14", "--batch-size", "4"]
    features = ["--reference", str(exported.parent / "reference.npz"), "--features", "four_means:FourMeans"]
    example.main(
        [str(exported), *features, *sizes, "--shares", "3", "--gpus", "0.5", "--out", str(tmp_path / "ray")]
    )
    shown = capsys.readouterr().out
    assert "share 4 of 5 is measured\nshare 0 of 3 is measured\nshare 1 of 3 is measured" in shown
    assert ray == [{"num_cpus": 1, "num_gpus": 0.5, "max_retries": 5}] * 2
    reference = Reference.open(exported.parent / "reference.npz", BlockMeans())
    whole = run(
        {exported.name: deployed}, example.PLANS, reference, tmp_path / "one", samples=14, batch_size=4
    )
    shared = json.loads((tmp_path / "ray" / "report.json").read_text(encoding="utf-8"))
    found = {row["plan"]: row["frechet"] for row in shared["rows"] if row["role"] != "equal compute"}
    assert found == {row.plan: row.frechet.to_json() for row in whole.rows if not row.is_alternative}
    assert [plan for plan in found if plan != "none"] == list(example.PLANS)


def test_the_ray_example_of_a_calibration_gives_what_one_call_gives(
    ray: list[dict[str, Any]],
    tiny_pipeline: DDIMPipeline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    sizes = ["--steps", "3", "--samples", "7", "--batch-size", "2", "--seed", "5"]
    out = str(tmp_path / "ray")
    load("calibrate_ray").main([str(tmp_path / "pipeline"), *sizes, "--shares", "3", "--out", out])
    told = capsys.readouterr().out
    assert "share 0 of 3 is recorded\nshare 1 of 3 is recorded\nshare 2 of 3 is recorded" in told
    assert ray == [{"num_cpus": 1, "num_gpus": 0, "max_retries": 5}]
    assert cli.main(["calibrate", str(tmp_path / "pipeline"), *sizes, "--out", str(tmp_path / "one")]) == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "ray").rglob("*.*")} == {
        file.name: file.read_bytes() for file in (tmp_path / "one").rglob("*.*")
    }


def start(tmp_path: Path, script: str = "report.sbatch", **environment: str) -> list[dict[str, Any]]:
    """What the script calls, of `sbatch` and `errata`."""
    record = tmp_path / "record"
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("sbatch", "errata"):
        program = programs / name
        program.write_text(RECORDER.format(python=sys.executable, record=str(record)), encoding="utf-8")
        program.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(FOLDER / script), *ASKED],
        env={"PATH": path, "HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def test_the_slurm_script_submits_its_stages_one_after_another(tmp_path: Path) -> None:
    calls = start(tmp_path, OUT="/shared/out", SHARDS="4")
    script = str(FOLDER / "report.sbatch")
    expected: list[tuple[str, list[str]]] = [
        ("first", []),
        ("share", ["--array=0-3", "--dependency=afterok:101"]),
        ("merge", ["--gpus-per-task=0", "--dependency=afterok:102"]),
    ]
    assert [call["name"] for call in calls] == ["sbatch"] * 3
    for call, (stage, options) in zip(calls, expected, strict=True):
        assert call["arguments"] == ["--parsable", f"--export=ALL,STAGE={stage}", *options, script, *ASKED]


@pytest.mark.parametrize(("stage", "shard"), [("first", "999998/999999"), ("share", "3/16"), ("merge", None)])
def test_the_stages_of_the_slurm_script_are_commands(tmp_path: Path, stage: str, shard: str | None) -> None:
    (call,) = start(
        tmp_path,
        OUT="/shared/out",
        STAGE=stage,
        SLURM_JOB_ID="7",
        SLURM_ARRAY_TASK_ID="3",
        SLURM_ARRAY_TASK_COUNT="16",
        SLURM_CPUS_PER_TASK="8",
    )
    assert (call["name"], call["threads"]) == ("errata", "8")
    parsed = cli.build_parser().parse_args(call["arguments"])
    assert (parsed.shard, str(parsed.out)) == (shard, "/shared/out")
    if stage == "merge":
        assert ([str(each) for each in parsed.merge], parsed.artifacts) == (["/shared/out"], [])
    else:
        assert [str(each) for each in parsed.artifacts] == ["runs/a", "runs/with space"]


def test_the_slurm_script_of_a_calibration_records_shares_and_merges_them(tmp_path: Path) -> None:
    script = str(FOLDER / "calibrate.sbatch")
    share, merge = start(tmp_path, "calibrate.sbatch", OUT="/shared/out", SHARDS="4")
    assert share["arguments"] == ["--parsable", "--export=ALL,STAGE=share", "--array=0-3", script, *ASKED]
    after = ["--gpus-per-task=0", "--dependency=afterok:101"]
    assert merge["arguments"] == ["--parsable", "--export=ALL,STAGE=merge", *after, script]
    inside = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    told = [
        start(tmp_path, "calibrate.sbatch", OUT="/out", STAGE=stage, SLURM_CPUS_PER_TASK="8", **inside)[-1]
        for stage in ("share", "merge")
    ]
    assert [(call["name"], call["threads"]) for call in told] == [("errata", "8")] * 2
    assert told[0]["arguments"] == ["calibrate", *ASKED, "--out", "/out", "--shard", "3/16"]
    assert told[1]["arguments"] == ["calibrate", "--merge", "/out", "--out", "/out"]


@pytest.mark.parametrize(("name", "what"), [("report.sbatch", "report"), ("calibrate.sbatch", "calibration")])
def test_the_slurm_script_wants_a_directory(name: str, what: str) -> None:
    script = shlex.quote(str(FOLDER / name))
    done = subprocess.run(["bash", "-c", f"env -u OUT bash {script}"], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"set OUT to the directory of the {what}" in done.stderr
