"""Compare the wall-clock overhead of correction plans with the overhead as errata defines it.

    python benchmarks/overhead.py ARTIFACT [ARTIFACT …] [--plans iec forecast-2 …] [--rounds 9]

Plans are named as in `correction_cells.py`; plans that an artifact cannot run are left out. "wrapped" is
the artifact in a `CorrectedPipeline` that corrects nothing.

Every round samples one batch uncorrected and one under each plan, in turn, so that a drift in the machine's
speed cancels. Measured is the median over rounds of (corrected time / uncorrected time of that round) - 1;
defined is Σ(extra calls × their cost) / Σ(base calls × their cost), with costs from the same process.

Wall-clock times of whole runs vary on a shared machine, so the time spent outside the network is measured
too: `besides` is the median time that correction adds there, as a share of the uncorrected run. The last
column is (defined + besides) / defined, the ratio if all calls of the network took equally long. For a plan
without extra calls, `besides` is the whole overhead.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from correction_cells import FITTED, PLANS

from errata import correct, deploy
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.machine import describe_machine

OFFERED = [name for name in PLANS if not name.startswith(FITTED)]  # which has no plan of its own
DEFAULT = ("iec-ends-10", "iec", "second-order", "forecast-1", "forecast-1+hindsight", "lookahead", "refresh")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measured against defined overhead.")
    parser.add_argument("artifacts", type=Path, nargs="+", help="artifacts to time")
    parser.add_argument(
        "--plans",
        nargs="+",
        default=list(DEFAULT),
        choices=OFFERED,
        metavar="PLAN",
        help="plans to time (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    options = parser.parse_args()
    print(f"{describe_machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"batch {options.batch_size}, {options.rounds} rounds")
    columns = f"{'defined':>8} {'measured':>9} {'quartiles':>17} {'ratio':>6} {'besides':>8} {'ratio':>6}"
    print(f"{'artifact':<26} {'plan':<21} {columns}")
    for path in options.artifacts:
        measure(path, options.plans, options.batch_size, options.rounds)


def measure(path: Path, plans: list[str], batch_size: int, rounds: int) -> None:
    """Print one line for each plan on one artifact."""
    deployed = deploy.load(path)
    deployed.pipe.set_progress_bar_config(disable=True)
    corrected = {"wrapped": correct.wrap(deployed, correct.Plan.none())}
    for name in plans:
        with contextlib.suppress(PlanError):
            corrected[name] = correct.wrap(deployed, PLANS[name])
    network = Stopwatch(deployed)
    seconds: dict[str, list[float]] = {name: [] for name in ("none", *corrected)}
    outside: dict[str, list[float]] = {name: [] for name in seconds}
    for turn in range(rounds + 1):
        for name in seconds:
            network.total = 0.0
            took = timed(corrected.get(name, deployed), batch_size, seed=turn)
            if turn:  # the first round warms up
                seconds[name].append(took)
                outside[name].append(took - network.total)
    typical = statistics.median(seconds["none"])
    for name, pipeline in corrected.items():
        ratios = [a / b - 1 for a, b in zip(seconds[name], seconds["none"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        added = [a - b for a, b in zip(outside[name], outside["none"], strict=True)]
        besides = statistics.median(added) / typical
        defined = pipeline.overhead()
        shares = (f"{(x / defined):>6.3f}" if defined else f"{'':>6}" for x in (middle, defined + besides))
        print(
            f"{path.name:<26} {name:<21} {defined:>8.3f} {middle:>9.3f} {f'{low:.3f} to {high:.3f}':>17} "
            f"{next(shares)} {besides:>8.4f} {next(shares)}",
            flush=True,
        )


class Stopwatch:
    """Adds up the seconds that an artifact's denoiser is being evaluated."""

    def __init__(self, deployed: DeployedPipeline) -> None:
        self.total = 0.0
        denoiser = deployed.denoiser
        for kind in ("full", "cached"):
            setattr(denoiser, kind, self._watched(getattr(denoiser, kind)))

    def _watched(self, call: Callable[..., object]) -> Callable[..., object]:
        def watched(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.total += time.perf_counter() - start

        return watched


def timed(pipeline: Callable[..., object], batch_size: int, *, seed: int) -> float:
    """Wall-clock seconds of one call."""
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    pipeline(batch_size=batch_size, generator=generator, output_type="np")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
