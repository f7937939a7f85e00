"""Measure how far each backend is from the simulation, at every step and in whole images.

    python benchmarks/agreement.py --compressed DIR --artifact DIR --calibration DIR

Each step gets its recorded input, so errors do not accumulate; in images they do. Prints the largest
relative error over steps (max |difference| / max |simulated|) and the largest relative RMS error of the
predictions, full and cached, then both for the images, as differences of values in [0, 1].
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from errata import calibration, compress, deploy
from errata.calibration import CalibrationSet
from errata.compress import CompressedPipeline
from errata.deploy import DeployedPipeline
from errata.deploy.kernel_registry import backend_names
from errata.errors import ArtifactError


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Agreement of backends with the simulation.")
    parser.add_argument("--compressed", type=Path, required=True, help="compressed pipeline, the simulation")
    parser.add_argument("--artifact", type=Path, required=True, help="artifact made from it")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="calibration set, whose inputs are replayed"
    )
    parser.add_argument("--images", type=int, default=64, help="images to sample (default: %(default)s)")
    options = parser.parse_args()
    simulated = compress.load(options.compressed)
    trajectories = calibration.load(options.calibration)
    expected = images_of(simulated, options.images)
    print(f"{options.artifact.name}: {trajectories.num_steps} steps, {options.images} images")
    print(f"{'backend':<10} {'step: max':>10} {'step: RMS':>10} {'image: max':>11} {'image: RMS':>11}")
    for backend in backend_names():
        try:
            deployed = deploy.load(options.artifact, backend=backend)
        except ArtifactError as error:
            print(f"{backend:<10} {error}")
            continue
        pairs = list(predictions(simulated, deployed, trajectories))
        found = images_of(deployed, options.images)
        print(
            f"{backend:<10} {max(relative_maximum(*pair) for pair in pairs):>10.1e} "
            f"{max(relative_rms(*pair) for pair in pairs):>10.1e} "
            f"{float((found - expected).abs().max()):>11.1e} {rms(found - expected):>11.1e}"
        )


def predictions(
    simulated: CompressedPipeline, deployed: DeployedPipeline, trajectories: CalibrationSet
) -> Iterator[tuple[Tensor, Tensor]]:
    """Deployed and simulated prediction at every step; where there is a cache, from a cached call too."""
    for step in range(trajectories.num_steps):
        x = next(trajectories.batches(step, limit=16)).sample
        expected, feature = simulated.denoiser.full(x, step, {})
        found, _ = deployed.denoiser.full(x, step, {})
        yield found, expected
        if feature is not None:
            expected = simulated.denoiser.cached(x, step, {}, feature)
            yield deployed.denoiser.cached(x, step, {}, feature), expected


def images_of(pipeline: CompressedPipeline | DeployedPipeline, count: int) -> Tensor:
    """Images in [0, 1] from a fixed seed."""
    pipeline.pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipeline(batch_size=count, generator=generator, output_type="np").images)


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference as a share of the RMS of what was expected."""
    return rms(found - expected) / rms(expected)


def relative_maximum(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest value expected."""
    return float((found - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    main()
