"""What works without brevitas, torchao and datasets: everything that is done with a finished artifact."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import COMMAND, ForkServer

from errata.calibration import CalibrationSet

# Hides the packages named in a variable as if they were not installed. A finder that raised would break those
# who ask politely. What works without any of them is imported first.
WITHOUT = """
import os, sys
from importlib.machinery import PathFinder

class WithoutSome(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["HIDDEN"].split():
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutSome
os.environ["HIDDEN"] = "brevitas torchao datasets"
import torch
from diffusers import DDIMPipeline, UNet2DModel
from errata import correct, deploy, report
from errata.deploy import assembly
"""
LIFE = """
import sys
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


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs programs that find none of the packages in `HIDDEN`."""
    with ForkServer(WITHOUT, tmp_path_factory.mktemp("lacking")) as server:
        yield server


def test_an_artifact_is_loaded_sampled_corrected_and_reported_without_them(
    tiny_artifact: Callable[[str], Path], tmp_path: Path, lacking: ForkServer
) -> None:
    hidden = {"HIDDEN": "brevitas torchao datasets"}
    done = lacking.run(LIFE, tiny_artifact("w4a8"), tmp_path / "report", environment=hidden)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["brevitas", "torchao"])
def test_compressing_names_the_package_that_it_needs(
    package: str, tmp_path: Path, tiny_calibration: CalibrationSet, lacking: ForkServer
) -> None:
    command = ["compress", tmp_path / "pipe", "--calibration", tiny_calibration.path]
    options = ["--recipe", "w8a8", "--out", tmp_path / "out"]
    done = lacking.run(COMMAND, *command, *options, environment={"HIDDEN": package})
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"errata: error: compressing needs {package}, which is not installed: pip install {package}"
    ]
