"""What works without brevitas, torchao and datasets: everything that is done with a finished artifact."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from errata.calibration import CalibrationSet

# Hides packages as if they were not installed. A finder that raised would break those who ask politely.
WITHOUT = """
import sys
from importlib.machinery import PathFinder

class WithoutSome(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutSome
"""
LIFE = """
from pathlib import Path

import torch
from torch import nn

from errata import correct, deploy, report

compress = sorted(name for name in sys.modules if name.startswith("errata.compress"))
assert compress == [], f"errata.deploy, correct and report bring in {compress}"

class FourMeans(nn.Module):
    name, channels = "block-means", 1

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

torch.set_num_threads(1)
deployed = deploy.load(sys.argv[1], device="cpu", backend="reference")
fast = deploy.load(sys.argv[1], device="cpu")
plan = correct.Plan(correct.IEC(), "all")
seed = lambda: torch.Generator().manual_seed(0)
plain = deployed(batch_size=1, generator=seed(), output_type="np").images
fast(batch_size=1, generator=seed())
corrected = correct.wrap(deployed, plan)(batch_size=1, generator=seed(), output_type="np").images
assert (plain != corrected).any()
network = FourMeans()
real = torch.rand(50, 1, 8, 8, generator=seed())
reference = report.Reference(network, report.statistics(network(real)), "random images", network.name)
result = report.run(
    deployed, {"none": correct.Plan.none()}, reference, sys.argv[2], samples=20, batch_size=10, resamples=2
)
assert len(result.rows) == 1
assert (Path(sys.argv[2]) / "report.html").is_file()
assert not {"brevitas", "torchao", "datasets"} & {name.partition(".")[0] for name in sys.modules}
"""
COMPRESS = """
from errata.cli import main

pipe, recording, out = sys.argv[1:]
sys.exit(main(["compress", pipe, "--calibration", recording, "--recipe", "w8a8", "--out", out]))
"""


def run_without(
    *packages: str, program: str, arguments: tuple[Path, ...]
) -> subprocess.CompletedProcess[str]:
    source = WITHOUT.format(hidden=set(packages)) + program
    command = [sys.executable, "-W", "ignore", "-c", source, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_an_artifact_is_loaded_sampled_corrected_and_reported_without_them(
    tiny_artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    done = run_without(
        "brevitas", "torchao", "datasets",
        program=LIFE, arguments=(tiny_artifact("w4a8"), tmp_path / "report"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_compressing_names_the_package_that_it_needs(
    tmp_path: Path, tiny_calibration: CalibrationSet
) -> None:
    path = tiny_calibration.path
    for package in ("brevitas", "torchao"):
        done = run_without(package, program=COMPRESS, arguments=(tmp_path / "pipe", path, tmp_path / "out"))
        assert done.returncode == 1
        assert done.stderr.splitlines() == [
            f"errata: error: compressing needs {package}, which is not installed: pip install {package}"
        ]
