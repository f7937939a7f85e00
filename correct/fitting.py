"""`fit_forecast`: weights for a forecast, fitted to a few runs of the artifact without its cache.

    symbol      here            meaning
    i, s_k      step, reads     a cached call, and the scheduled full calls that a forecast of it reads
    F_i         features        of a run in which every call is full
    w           weights         argmin Σ_samples ‖F_i - Σ_k w_k F_(s_k)‖², from (G + δ I) w = r
    G, r        moments         G_kl = Σ ⟨F_(s_k), F_(s_l)⟩, r_k = Σ ⟨F_(s_k), F_i⟩

It needs only the deployed artifact: no float weights, no real images. One weight serves all channels and
positions of a feature, so a few runs determine it, and a plan file holds a few numbers for each step.

Source: see `errata.correct.methods.fitted_forecast`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from errata.correct.methods.fitted_forecast import FittedForecast, reads
from errata.correct.methods.forecast import forecast_steps
from errata.correct.sampling import Inputs, batches_of, default_inputs, generators_of
from errata.correct.validation import is_count, require
from errata.deploy import DeployedPipeline
from errata.errors import ErrataError, PlanError
from errata.runtime.run import CallView, Evaluation
from errata.runtime.schedule import CacheSchedule

# δ, relative to the mean of G's diagonal: keeps the system solvable if a feature hardly changes between full
# steps.
_RIDGE = 1e-6
# Of a stored weight: far finer than the differences between runs.
_DECIMALS = 5


@dataclass(frozen=True, kw_only=True)
class FitChoices:
    """How to fit a forecast: its order, and to which images.

    Raises:
        PlanError: a value out of range.
    """

    order: int = 2
    samples: int = 32
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        require(is_count(self.order) and 1 <= self.order <= 3, self, "order", "1, 2 or 3")
        for name, least in (("samples", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            require(is_count(value) and value >= least, self, name, f"an integer, {least} or more")


def fit_forecast(
    deployed: DeployedPipeline,
    *,
    order: int = 2,
    samples: int = 32,
    batch_size: int = 32,
    seed: int = 0,
    inputs: Inputs | None = None,
    progress: bool = True,
) -> FittedForecast:
    """Return a forecast fitted to runs of an artifact in which every call is full.

    It costs `samples` images without the cache, once. It takes the memory of such a run and `order + 2`
    features. The artifact stays as it is.

    Args:
        deployed: a loaded artifact with a cache.
        order: 1 to 3; `order + 1` features are summed, or as many as full steps have passed.
        samples: images to sample.
        batch_size: images per batch.
        seed: of image 0; image i has the seed `seed + i`. Evaluate the plan on other images.
        inputs: the pipeline's keyword arguments for a batch of image indices; None is right for pipelines
            that draw from noise alone.
        progress: whether to show a bar.

    Raises:
        TypeError: `deployed` is not a loaded artifact.
        PlanError: an argument is out of range, or no cached step follows the second full one.
        ErrataError: features are not finite.
    """
    if not isinstance(deployed, DeployedPipeline):
        raise TypeError(
            f"fit_forecast() takes a loaded artifact, not a {type(deployed).__name__}: pass what "
            "deploy.load(path) returns"
        )
    choices = FitChoices(order=order, samples=samples, batch_size=batch_size, seed=seed)
    if not forecast_steps(deployed.schedule):
        raise PlanError(
            "this artifact has no cached step after its second full one, so there is nothing to forecast"
        )
    moments = Moments(deployed.schedule, most=choices.order + 1)
    make = default_inputs if inputs is None else inputs
    with tqdm(total=samples, unit="image", desc="fitting a forecast", disable=not progress) as bar:
        for batch in batches_of(choices.samples, choices.batch_size):
            _observe(deployed, moments, {**make(batch), "generator": generators_of(batch, choices.seed)})
            bar.update(len(batch))
    return FittedForecast(weights=moments.weights())


class Moments:
    """G and r of every cached call, on the device of the features until the weights are computed.

    Args:
        schedule: says which calls are full.
        most: most features that a forecast reads.
    """

    def __init__(self, schedule: CacheSchedule, *, most: int) -> None:
        self._schedule = schedule
        self._reads = {step: reads(step, schedule, most=most) for step in forecast_steps(schedule)}
        self._full = frozenset(schedule.full_steps)
        self._most = most
        self._stored: list[deque[Tensor]] = []
        self._sums: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Begin a run, which has no features yet."""
        self._stored = [deque(maxlen=self._most) for _ in range(self._schedule.calls_per_step)]

    def add(self, step: int, feature: Tensor) -> None:
        """Add the feature of a call; to be called for all calls of a run, in order."""
        stored = self._stored[self._schedule.stream(step)]
        if step in self._reads:
            rows = torch.stack([*list(stored)[::-1], feature]).flatten(1).double()
            products = rows @ rows.T
            self._sums[step] = self._sums.get(step, torch.zeros_like(products)) + products
        elif step in self._full:
            stored.append(feature)

    def weights(self) -> tuple[tuple[float, ...], ...]:
        """Return the weights of every call, rounded; empty where nothing is forecast.

        Raises:
            ErrataError: a feature was not finite.
        """
        return tuple(
            self._solved(step) if step in self._reads else () for step in range(self._schedule.num_steps)
        )

    def _solved(self, step: int) -> tuple[float, ...]:
        sums = self._sums[step].cpu()
        if not sums.isfinite().all():
            raise ErrataError(
                f"the feature of step {step}, or of a full step before it, is not finite: "
                "the artifact's network overflows; check the images of a run without correction"
            )
        gram, right = sums[:-1, :-1], sums[:-1, -1]
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        return tuple(round(weight, _DECIMALS) for weight in torch.linalg.solve(gram + ridge, right).tolist())


def _observe(deployed: DeployedPipeline, moments: Moments, arguments: dict[str, object]) -> None:
    """Sample once with every call in full, and add the features to `moments`."""
    streams = deployed.schedule.calls_per_step

    def decide(view: CallView) -> Evaluation:
        if view.stored:  # by the call before in this stream, which was full
            moments.add(view.step - streams, view.stored[-1][1])
        return Evaluation(kind="full")

    moments.begin()
    run = deployed.start(decide=decide)
    run.pipe.set_progress_bar_config(disable=True)
    run.pipe(**deployed.arguments(arguments))
    for call in run.latest:  # no later call would show their features
        assert call.feature is not None  # the artifact has a cache
        moments.add(call.step, call.feature)
