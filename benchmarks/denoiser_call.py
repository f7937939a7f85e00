"""Time one denoiser call: the float model against an artifact on each backend, side by side.

    python benchmarks/denoiser_call.py ARTIFACT --pipeline PIPELINE [--batch-sizes 1 16 64] [--rounds 15]

In every round each variant runs once, in turn, so that a drift in the machine's speed cancels in the ratios.
Prints the median milliseconds and the median ratio to the float model of the same round.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from call_timing import Call, interleaved_seconds

from errata import calibration, deploy
from errata.deploy import DeployedPipeline
from errata.embedded import PIPELINE
from errata.machine import describe_machine


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Time one denoiser call on each backend.")
    parser.add_argument("artifact", type=Path, help="artifact to time")
    parser.add_argument(
        "--pipeline", default=str(PIPELINE), help="float pipeline (default: the embedded model)"
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[1, 16, 64], help="batch sizes (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: %(default)s)")
    options = parser.parse_args()
    float_unet = calibration.load_pipeline(options.pipeline).unet.eval()
    backends = {name: deploy.load(options.artifact, backend=name) for name in ("reference", "onednn", "auto")}
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{options.artifact}: {backends['auto'].manifest.summary()}")
    for batch_size in options.batch_sizes:
        calls = variants(float_unet, backends, batch_size)
        print(f"\nbatch {batch_size:<10} {'median ms':>10} {'ratio to float':>15}")
        for name, milliseconds, ratio in measure(calls, options.rounds):
            print(f"{name:<16} {milliseconds:>10.2f} {ratio:>15.2f}")


def variants(
    float_unet: torch.nn.Module, backends: dict[str, DeployedPipeline], batch_size: int
) -> dict[str, Call]:
    """What is timed, by name; the float model first."""
    denoiser = next(iter(backends.values())).denoiser
    config = float_unet.config
    x = torch.randn(batch_size, config.in_channels, config.sample_size, config.sample_size)
    time_of_step = torch.tensor(denoiser.timesteps[0])
    calls: dict[str, Call] = {"float": lambda: float_unet(x, time_of_step)}
    for name, deployed in backends.items():
        calls |= calls_of(name, deployed, x)
    return calls


def calls_of(name: str, deployed: DeployedPipeline, x: torch.Tensor) -> dict[str, Call]:
    """Full and, where there is a cache, cached call of one backend."""
    denoiser = deployed.denoiser
    _, feature = denoiser.full(x, 0, {})
    calls: dict[str, Call] = {name: lambda: denoiser.full(x, 0, {})}
    if feature is not None:
        calls[f"{name}, cached"] = lambda: denoiser.cached(x, 0, {}, feature)
    return calls


@torch.no_grad()
def measure(calls: dict[str, Call], rounds: int) -> list[tuple[str, float, float]]:
    """Return name, median milliseconds and median ratio to the first of the same round."""
    seconds = interleaved_seconds(calls, rounds)
    first = next(iter(seconds.values()))
    return [
        (
            name,
            1000 * statistics.median(times),
            statistics.median(one / base for one, base in zip(times, first, strict=True)),
        )
        for name, times in seconds.items()
    ]


if __name__ == "__main__":
    main()
