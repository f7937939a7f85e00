"""Measure three newer ways to serve cached steps against `Forecast`, at the same number of full calls.

    python benchmarks/caches.py --work runs/caches --steps 25 --recipes w8a8+deepcache-5
    python benchmarks/caches.py --work runs/caches --steps 50 --recipes w8a8+deepcache-10

Rows are the number of full calls and the PSNR to the float model's images from the same noise. The change is
the mean of the paired differences to `Forecast` on the artifact's own schedule, with its 95 % interval. What
is tuned or measured before sampling (EasyCache's threshold, the table of errors) sees other noise.

    Spectrum    the feature is a ridge regression on Chebyshev polynomials of the step over the last full
                features, blended with linear extrapolation (arXiv 2603.01623)
    EasyCache   each batch decides while it runs when the next full call is due, K at most (arXiv 2507.02860)
    CEM         K full steps of least error in a table of measured errors (arXiv 2512.23258)

With `--distances` there is also the Fréchet distance in digit features.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cache_placement import ErrorTable
from cache_runs import MEASURED, TUNED, IsFull, State, Weights, at, images, linear, reuse
from numpy.polynomial.chebyshev import chebvander
from sheets import add_distances, artifact_for, distance, opened, sampled
from torch import Tensor

from errata.correct import Forecast, Hindsight, Plan
from errata.correct.sampling import PlanSampler, default_inputs
from errata.deploy import DeployedPipeline
from errata.embedded import PIPELINE
from errata.quality.intervals import mean_estimate
from errata.quality.paired import psnr
from errata.quality.reference import Reference


def spectrum(num_steps: int, *, order: int, ridge: float, last: int, blend: float) -> Weights:
    """Return Spectrum's weights: `blend` of the regression, the rest of `linear`."""

    def weights(known: Sequence[int], step: int) -> list[float]:
        if len(known) < 2:
            return reuse(known, step)
        time = 2 * np.array([*known[-last:], step]) / (num_steps - 1) - 1
        basis = chebvander(time, order)
        rows, here = basis[:-1], basis[-1]
        fitted = here @ np.linalg.solve(rows.T @ rows + ridge * np.eye(order + 1), rows.T)
        fitted = np.concatenate([np.zeros(len(known) - len(fitted)), fitted])
        return (blend * fitted + (1 - blend) * np.array(linear(known, step))).tolist()

    return weights


class EasyCache:
    """Full where k Σ ‖x_n - x_(n-1)‖ / ‖v_(n-1)‖ since the last full call passes a threshold; `most` at most.

    k = ‖Δv‖ / ‖Δx‖ at the last full call, against the step before it; in the first interval at its first
    cached step, since step 0 has none before it. Norms are means over the batch.
    """

    def __init__(self, threshold: float, most: int) -> None:
        self._threshold, self._most, self._sum = threshold, most, 0.0

    def __call__(self, step: int, sample: Tensor, state: State) -> bool:
        """Return whether this step is full."""
        if step == 0:
            self._sum = 0.0
            return True
        if step == 1:
            return False
        before = max(1, state.stored[-1][0])
        rate = _norm(state.predictions[before] - state.predictions[before - 1])
        rate /= _norm(state.samples[before] - state.samples[before - 1])
        self._sum += rate * _norm(sample - state.samples[-1]) / _norm(state.predictions[-1])
        if self._sum <= self._threshold or len(state.stored) == self._most:
            return False
        self._sum = 0.0
        return True

    @classmethod
    def calibrated(cls, deployed: DeployedPipeline, most: int, weights: Weights) -> EasyCache:
        """Return it with the smallest threshold, to 3 %, at which 8 images take at most `most` calls."""
        low, high = 0.0, 8.0
        while high - low > 0.03 * high:
            middle = (low + high) / 2 if low else high / 4
            full: list[int] = []
            images(deployed, cls(middle, most + 1), weights, 8, seed=TUNED, full=full)
            low, high = (middle, high) if full[0] > most else (low, middle)
        return cls(high, most)


def _norm(values: Tensor) -> float:
    return float(values.flatten(1).norm(dim=1).mean())


class Rows:
    """The rows of one artifact."""

    def __init__(self, deployed: DeployedPipeline, options: argparse.Namespace, floats: Tensor) -> None:
        self._deployed, self._options, self._floats = deployed, options, floats
        self._count = max(options.samples, options.distances)
        self._forecast: Tensor | None = None

    def plan(self, name: str, plan: Plan) -> None:
        """Measure and print a plan, on the artifact's own schedule; the first is what others compare with."""
        sampler = PlanSampler(self._deployed, plan, seed=MEASURED, inputs=default_inputs)
        self._print(name, sampled(sampler, self._count), len(self._deployed.schedule.full_steps))

    def run(self, name: str, is_full: IsFull, weights: Weights) -> None:
        """Measure and print runs with other full steps, or other features."""
        full: list[int] = []
        made = images(self._deployed, is_full, weights, self._count, full=full)
        self._print(name, made, sum(full) / len(full))

    def _print(self, name: str, made: Tensor, full: float) -> None:
        count = self._options.samples
        values = psnr(made[:count], self._floats[:count])
        text = f"{name:52} {full:4.1f} {float(values.mean()):6.2f} dB"
        if self._forecast is None:
            self._forecast = values
        else:
            change = mean_estimate(values - self._forecast)
            text += f"  {change.value:+5.2f} ({change.interval.low:+.2f} to {change.interval.high:+.2f})"
        if self._options.distances:
            text += f"  FD {distance(made, Reference.embedded()):.2f}"
        print(text, flush=True)


def measure(deployed: DeployedPipeline, options: argparse.Namespace, floats: Tensor) -> None:
    """Print all rows of an artifact."""
    own = deployed.schedule.full_steps
    total, count = deployed.schedule.num_steps, len(own)
    print(deployed.manifest.recipe.name)
    rows = Rows(deployed, options, floats)
    rows.plan("Forecast", Plan(Forecast()))
    rows.plan("reuse", Plan.none())
    for gain in (0.5, 1.0):
        rows.plan(f"Forecast + Hindsight({gain})", Plan(Forecast()) + Plan(Hindsight(gain=gain)))
    # The paper's choices; and those that were best on other noise, of 72.
    chosen = spectrum(total, order=4, ridge=0.1, last=100, blend=0.5)
    rows.run("Spectrum, order 4, ridge 0.1, all features", at(own), chosen)
    chosen = spectrum(total, order=2, ridge=0.001, last=3, blend=0.5)
    rows.run("Spectrum, order 2, ridge 0.001, 3 features", at(own), chosen)
    ways: dict[str, Weights] = {"reuse": reuse, "linear forecast": linear}
    growing = growing_steps(total, count)
    rows.run(f"growing intervals, linear forecast, {listed(growing)}", at(growing), linear)
    for name, weights in ways.items():
        rows.run(f"EasyCache, {name}", EasyCache.calibrated(deployed, count, weights), weights)
    table = ErrorTable(deployed)
    for name, weights in ways.items():
        steps = table.placed(count, weights)
        rows.run(f"CEM, {name}, {listed(steps)}", at(steps), weights)
        steps = table.placed_by_effect(count, weights)
        rows.run(f"CEM by effect, {name}, {listed(steps)}", at(steps), weights)


def growing_steps(total: int, count: int) -> tuple[int, ...]:
    """Return full steps of which each interval is longer than the one before, as in Spectrum."""
    return tuple(round(total * (place / count) ** 1.25) for place in range(count))


def listed(steps: Sequence[int]) -> str:
    """Return steps as a recipe writes them."""
    return "/".join(map(str, steps))


def main() -> None:
    """Run the benchmark."""
    options = parsed()
    pipe, floats = opened(options, PIPELINE)
    for recipe in options.recipes:
        measure(artifact_for(pipe, options, recipe), options, floats)


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for artifacts")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--samples", type=int, default=64, help="images whose PSNR is measured")
    add_distances(parser)
    parser.add_argument("--recipes", nargs="+", required=True, help="cached artifacts to measure")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
