"""Place the full steps of a cache by a table of measured errors, without a float model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from cache_runs import TUNED, Weights, linear, noise, scheduler_of
from torch import Tensor

from errata.deploy import DeployedPipeline

_PROBED = 10  # steps at which the effect of an error on the image is measured; the others are interpolated


class ErrorTable:
    """δ_(s,i): the error of the prediction at step i from the feature of step s, on a run without the cache.

    An error at step i changes the image g_i times as much. Errors of a forecast follow from the table, since
    the prediction is nearly linear in the feature: those of the features that it reads, with its weights.

    Args:
        deployed: a loaded artifact with a cache.
        count: images.
    """

    @torch.no_grad()
    def __init__(self, deployed: DeployedPipeline, count: int = 8) -> None:
        self._deployed, self._scheduler = deployed, scheduler_of(deployed)
        self.num_steps = deployed.schedule.num_steps
        sample = noise(deployed, range(count), TUNED)
        self._samples, self._predictions, features = [], [], []
        for step in range(self.num_steps):
            prediction, feature = deployed.denoiser.full(sample, step, {})
            assert feature is not None
            self._samples.append(sample)
            self._predictions.append(prediction)
            features.append(feature)
            sample = self._next(sample, prediction, step)
        self._last = sample
        self.errors = {
            (start, step): deployed.denoiser.cached(
                self._samples[step], step, {}, features[start], is_extrapolated=True
            )
            - self._predictions[step]
            for step in range(self.num_steps)
            for start in range(step)
        }
        self.effects = self._effects()
        self._memo: dict[tuple[int | None, int, int], Tensor] = {}

    def error(self, weights: Weights, known: Sequence[int], step: int) -> Tensor:
        """Return the error of a step's prediction, given the full steps before it."""
        factors = zip(weights(known, step), known, strict=True)
        total = sum(factor * self.errors[start, step] for factor, start in factors if factor)
        assert isinstance(total, Tensor)
        return total

    def placed(self, count: int, weights: Weights) -> tuple[int, ...]:
        """Return the full steps for which the sum of Σ|δ| over the cached steps is least (CEM), exact.

        Dynamic programming over intervals, each with the one before it, which a forecast reads.
        """
        total = self.num_steps
        best: dict[tuple[int | None, int], tuple[float, tuple[int, ...]]] = {(None, 0): (0.0, (0,))}
        for _ in range(count - 1):
            longer: dict[tuple[int | None, int], tuple[float, tuple[int, ...]]] = {}
            for (before, start), (cost, steps) in best.items():
                known = [step for step in (before, start) if step is not None]
                for end in range(start + 1, total):
                    if end > start + 1:
                        cost += float(self.error(weights, known, end - 1).abs().mean())
                    if (start, end) not in longer or cost < longer[start, end][0]:
                        longer[start, end] = cost, (*steps, end)
            best = longer
        return min((self._closed(cost, steps, weights), steps) for cost, steps in best.values())[1]

    def _closed(self, cost: float, steps: tuple[int, ...], weights: Weights) -> float:
        rest = range(steps[-1] + 1, self.num_steps)
        return cost + sum(float(self.error(weights, steps[-2:], step).abs().mean()) for step in rest)

    def placed_by_effect(self, count: int, weights: Weights) -> tuple[int, ...]:
        """Return the full steps with the best expected PSNR: errors weighted by g_i, and summed with sign.

        The sum over all intervals is no sum of costs, so this is a descent, one step at a time, from equal
        intervals and from five random schedules.
        """
        draw, total = random.Random(0), self.num_steps
        starts = [tuple(round(place * total / count) for place in range(count))]
        starts += [(0, *sorted(draw.sample(range(1, total), count - 1))) for _ in range(5)]
        return max(self._descended(steps, weights) for steps in starts)[1]

    def _descended(self, steps: tuple[int, ...], weights: Weights) -> tuple[float, tuple[int, ...]]:
        value, is_improving = self._expected(steps, weights), True
        while is_improving:
            is_improving = False
            for place in range(1, len(steps)):
                bounds = (*steps, self.num_steps)
                moved = [
                    (*steps[:place], step, *steps[place + 1 :])
                    for step in range(steps[place - 1] + 1, bounds[place + 1])
                ]
                found = max((self._expected(other, weights), other) for other in moved)
                if found[0] > value + 1e-9:
                    (value, steps), is_improving = found, True
        return value, steps

    def _expected(self, steps: tuple[int, ...], weights: Weights) -> float:
        """Return the mean PSNR, half by the sum of all errors, half by those of the intervals apart."""
        ends = (*steps[1:], self.num_steps)
        befores = (None, *steps[:-1])
        sums = [
            self._interval(*each, weights)
            for each in zip(befores, steps, ends, strict=True)
            if each[2] > each[1] + 1
        ]
        together = sum(sums).flatten(1).square().mean(dim=1)  # type: ignore[union-attr]
        apart = sum(each.flatten(1).square().mean(dim=1) for each in sums)
        return float((-10 * ((together + apart) / 8).log10()).mean())  # samples lie in [-1, 1]

    def _interval(self, before: int | None, start: int, end: int, weights: Weights) -> Tensor:
        key = (before if weights is linear else None, start, end)
        if key not in self._memo:
            known = [step for step in (before, start) if step is not None]
            here = self.effects[end - 1] * self.error(weights, known, end - 1)
            self._memo[key] = (
                here if end == start + 2 else here + self._interval(before, start, end - 1, weights)
            )
        return self._memo[key]

    def _effects(self) -> list[float]:
        """Return g_i: how much the image changes for each unit of change of the prediction at step i."""
        last = self.num_steps - 1
        # The last step is probed as well: there is no noise after it, and its effect is far smaller.
        probed = sorted({*np.geomspace(1, last - 1, _PROBED).round().astype(int).tolist(), last})
        found = []
        for step in probed:
            error = self.errors[max(0, step - max(1, self.num_steps // 12)), step]
            sample = self._next(self._samples[step], self._predictions[step] + error, step)
            for later in range(step + 1, self.num_steps):
                prediction, _ = self._deployed.denoiser.full(sample, later, {})
                sample = self._next(sample, prediction, later)
            found.append(float((sample - self._last).norm() / error.norm()))
        return np.exp(np.interp(range(self.num_steps), probed, np.log(found))).tolist()

    def _next(self, sample: Tensor, prediction: Tensor, step: int) -> Tensor:
        return self._scheduler.step(prediction, self._scheduler.timesteps[step], sample).prev_sample
