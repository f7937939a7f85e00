"""`Plan.auto`: the best plan that costs nothing, chosen in seconds from a few of the artifact's own images.

A cache is judged by what it was meant to save: the artifact's own run without it, from the same noise. So no
float model and no real images are needed. The candidates are the methods that take no evaluation. The
best one by PSNR on a few noises is measured again on others; it has to be better there than no correction,
beyond noise, or there is no correction. Without a cache there is nothing to judge by, and nothing is done.

A sheet brings its own measurement, made on noise that its fit did not see. The one with the best plan behind
it is added to that plan; if it was fitted under a plan that is worse here, it is left out.

Source: this project.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.correct.methods.forecast import Forecast
from errata.correct.methods.hindsight import Hindsight
from errata.correct.methods.sheet import Sheet
from errata.correct.pipeline import wrap
from errata.correct.planner.candidates import cache_free_plan
from errata.correct.plans import Plan, register_auto
from errata.correct.sampling import Inputs, PlanSampler, batches_of, default_inputs
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.quality.intervals import mean_estimate
from errata.quality.paired import psnr

# Shares of Hindsight's correction. All of it is too much where errors grow otherwise than a polynomial's.
_GAINS = (0.25, 0.5, 1.0)
# Seed of the first image, far from those that people use to make images.
_SEED = 3_000_000_000


@register_auto
def auto(
    deployed: DeployedPipeline,
    *,
    sheets: Sequence[Sheet] = (),
    inputs: Inputs | None = None,
    samples: int = 16,
    batch_size: int = 16,
    seed: int = _SEED,
) -> Plan:
    """Return the plan without any evaluation that is best for this artifact, bound to it.

    At another number of steps than the recorded one it is not bound.

    Args:
        deployed: a loaded artifact.
        sheets: sheets of this artifact, which may be a part of the plan.
        inputs: the pipeline's keyword arguments for a batch of image indices, 0 to `2 * samples - 1`; None is
            right for pipelines that draw from noise alone.
        samples: images that choose, and as many others that measure.
        batch_size: images per batch.
        seed: of image 0; image i has the seed `seed + i`.

    Raises:
        PlanError: a sheet belongs to another artifact.
    """
    for sheet in sheets:
        sheet.check_artifact(deployed)
    judge = _Judge(deployed, default_inputs if inputs is None else inputs, samples, batch_size, seed)
    chosen = judge.best([plan for plan in free_plans(deployed) if _serves(deployed, plan)])
    # The plan of a sheet names the calls of its fit.
    calls = deployed.schedule.num_steps
    fitting = [sheet for sheet in sheets if len(sheet.facts.levels.values) == calls]
    helpful = [sheet for sheet in fitting if judge.is_as_good(Plan.under_sheet(sheet), chosen)]
    if helpful:
        chosen = Plan.of_sheet(max(helpful, key=lambda sheet: sheet.facts.measured.corrected_psnr))
    # A bound plan holds for the recorded number of steps alone.
    is_recorded = deployed.num_inference_steps == deployed.manifest.sampler.num_inference_steps
    return chosen.bound(deployed) if is_recorded else chosen


def free_plans(deployed: DeployedPipeline) -> list[Plan]:
    """Return the plans that take no evaluation; none for an artifact without a cache."""
    if not deployed.schedule.has_cache:
        return []
    forecast = Plan(Forecast())
    gained = [Plan(Hindsight(gain=gain)) for gain in _GAINS]
    return [forecast, *(forecast + plan for plan in gained), *gained]


class _Judge:
    """Compares plans with the artifact's own run without its cache, from the same noise."""

    def __init__(
        self, deployed: DeployedPipeline, inputs: Inputs, samples: int, batch_size: int, seed: int
    ) -> None:
        self._deployed, self._inputs, self._seed = deployed, inputs, seed
        middle = batches_of(samples, batch_size), batches_of(2 * samples, batch_size, first=samples)
        self._parts = dict(zip(("choose", "measure"), middle, strict=True))
        self._right: dict[str, Tensor] = {}
        self._known: dict[tuple[str, Plan], Tensor] = {}

    def best(self, plans: Sequence[Plan]) -> Plan:
        """Return the best of these and no correction."""
        if not plans:
            return Plan.none()
        ranked = sorted(plans, key=lambda plan: -float(self.values("choose", plan).mean()))
        first, none = ranked[0], Plan.none()
        if self.values("choose", first).mean() <= self.values("choose", none).mean():
            return none
        change = mean_estimate(self.values("measure", first) - self.values("measure", none))
        return first if change.interval.low > 0 else none

    def is_as_good(self, plan: Plan, other: Plan) -> bool:
        """Return whether a plan cannot be told from the other one, or is better."""
        if plan == other or not self._deployed.schedule.has_cache:
            return plan == other or plan.corrects_nothing
        change = mean_estimate(self.values("measure", plan) - self.values("measure", other))
        return change.interval.high >= 0

    def values(self, part: str, plan: Plan) -> Tensor:
        """Return the PSNR of each image of a part, dB."""
        if (part, plan) not in self._known:
            if part not in self._right:
                self._right[part] = self._images(part, cache_free_plan())
            self._known[part, plan] = psnr(self._images(part, plan), self._right[part])
        return self._known[part, plan]

    def _images(self, part: str, plan: Plan) -> Tensor:
        sampler = PlanSampler(self._deployed, plan, seed=self._seed, inputs=self._inputs)
        return torch.cat([sampler.sample(batch).images for batch in self._parts[part]])


def _serves(deployed: DeployedPipeline, plan: Plan) -> bool:
    try:
        wrap(deployed, plan)
    except PlanError:
        return False
    return True
