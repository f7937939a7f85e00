"""Measure how the memory of `errata.report.run` grows with the number of samples.

    OMP_NUM_THREADS=1 python benchmarks/report_memory.py --samples 1000 50000

The artifact is a random 8x8 network, run without and with correction. Features are the 64 pixels, and every
metric that needs no further weights is measured. Each number of samples runs in its own process, which
reports its peak.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from errata import calibration, compress, deploy, report
from errata.correct import IEC, Plan
from errata.quality import statistics

BATCH_SIZE = 100
STEPS = 2


class Pixels(nn.Module):
    """The pixels as features, and ten of them as class scores."""

    name, channels, dimension = "pixels", 1, 64

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 1, 8, 8)` to `(B, 64)`."""
        return images.flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """`(B, 64)` to `(B, 10)`."""
        return 4 * features[:, :10]


def main() -> None:
    """Run every number of samples, or one of them as the child."""
    parser = argparse.ArgumentParser(description="Memory of a report against its samples.")
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[1000, 50_000],
        help="numbers of images, each in its own process (default: %(default)s)",
    )
    parser.add_argument("--artifact", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.artifact is not None:
        return measure(options.artifact, options.samples[0])
    with tempfile.TemporaryDirectory() as folder:
        artifact = make_artifact(Path(folder))
        peaks = [child(artifact, samples) for samples in options.samples]
    for samples, peak in zip(options.samples, peaks, strict=True):
        print(f"{samples:>8} samples  {peak / 1e6:8.1f} MB  {peak / peaks[0]:.3f}")
    return None


def child(artifact: Path, samples: int) -> float:
    """Peak resident bytes of a report in a process of its own."""
    words = [sys.executable, __file__, "--artifact", str(artifact), "--samples", str(samples)]
    start = time.perf_counter()
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    print(f"{samples} samples took {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return float(said.split()[-1])


def measure(artifact: Path, samples: int) -> None:
    """Make a report, and print the peak."""
    real = torch.rand(2000, 64, generator=torch.Generator().manual_seed(0))
    reference = report.Reference(Pixels(), statistics(real), "noise", "pixels", real=real)
    plans = {"all": Plan(IEC(), "all")}
    with tempfile.TemporaryDirectory() as folder:
        report.run(
            deploy.load(artifact, device="cpu"),
            plans,
            reference,
            Path(folder) / "out",
            samples=samples,
            batch_size=BATCH_SIZE,
        )
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def make_artifact(folder: Path) -> Path:
    """Freeze a small random network."""
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    recording = calibration.calibrate(
        pipe, folder / "calibration", num_inference_steps=STEPS, num_samples=8, batch_size=8
    )
    compressed = compress.compress(pipe, recording, "w8a8", folder / "compressed")
    return deploy.deploy(compressed, folder / "artifact")


if __name__ == "__main__":
    main()
