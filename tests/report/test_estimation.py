"""What a report says before and after its first batch, and what it refuses."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from errata import memory
from errata.correct import IEC, Plan
from errata.deploy import DeployedPipeline
from errata.errors import ReportError
from errata.report import Reference, run

PLANS = {"first": Plan(IEC(), "first:1")}


def test_both_lines_are_announced(deployed: DeployedPipeline, reference: Reference, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    run(deployed, PLANS, reference, out, announce=said.append, samples=6, batch_size=2, shown=1, resamples=2)
    early, late = (line for line in said if " rows of 6 images" in line)
    assert early.startswith("2 rows of 6 images in batches of 2: at most about ")
    assert "of denoiser calls, in one process" in late
    stored = sum(file.stat().st_size for file in (out / "measurements").rglob("*.safetensors"))
    promised, unit = late.split("one process, ")[1].split(" ")[:2]
    assert unit == "kB"
    assert float(promised) == pytest.approx(stored / 1e3, rel=0.1)


def test_too_little_memory_is_refused_and_smaller_batches_can_follow(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(memory, "available_memory", lambda: 10_000)
        patched.setattr(memory.MemoryMeter, "growth", lambda _: 20_000)
        with pytest.raises(ReportError, match=r"not enough memory: 2 rows of 6 images .* lower `batch_size`"):
            run(deployed, PLANS, reference, out, samples=6, batch_size=4, resamples=2)
    assert list(out.rglob("*.safetensors")) == []
    run(deployed, PLANS, reference, out, samples=6, batch_size=2, resamples=2)


def test_too_little_disk_space_is_refused(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ReportError, match=r"not enough disk space in .* lower `samples`, or choose another"):
        run(deployed, PLANS, reference, tmp_path / "out", samples=6, batch_size=2, resamples=2)


def test_what_does_not_fit_after_the_first_batch_is_refused_and_stays(
    deployed: DeployedPipeline, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    left = iter([10**9])  # before the first batch

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=next(left, 100))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", usage)
        with pytest.raises(ReportError, match="not enough disk space"):
            run(deployed, PLANS, reference, out, samples=6, batch_size=2, resamples=2)
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    assert len(kept) >= 2
    run(deployed, PLANS, reference, out, samples=6, batch_size=2, resamples=2)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
