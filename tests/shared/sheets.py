"""A sheet with made-up numbers for any artifact, and a network that has them built in."""

from typing import Any

import torch
from torch import Tensor

from errata import correct
from errata.correct import Plan, Sheet
from errata.correct.sheets.fitted_maps import CallLevels, FittedMaps
from errata.correct.sheets.sheet_file import SheetFacts
from errata.deploy import DeployedPipeline
from errata.runtime.paired_change import PairedChange

FACTOR, OFFSET = 1.25, 0.125
MEASURED = PairedChange(images=2, psnr=1.0, corrected_psnr=2.0, change=1.0, low=0.5, high=1.5)


def made_up_sheet(
    deployed: DeployedPipeline, plan: Plan | None = None, *, channels: int | None = None, **facts: Any
) -> Sheet:
    """One factor and one offset for every evaluation of either kind."""
    schedule = deployed.schedule
    corrected = correct.wrap(deployed, Plan.none() if plan is None else plan)
    methods, steps = Sheet.parts_of(corrected)
    calls, kinds = schedule.num_steps, 2 if schedule.has_cache else 1
    rows, channels = calls * kinds, channels or deployed.pipe.unet.config.out_channels
    maps = FittedMaps(
        call=torch.arange(calls).repeat(kinds),
        kind=torch.arange(kinds, dtype=torch.uint8).repeat_interleave(calls),
        matrix=FACTOR * torch.eye(channels).repeat(rows, 1, 1),
        bias=torch.full((rows, channels), OFFSET),
    )
    told: dict[str, Any] = {
        "artifact": deployed.manifest.artifact_sha256,
        "teacher": "float",
        "plan": methods,
        "plan_steps": steps,
        "samples": 8,
        "seed": 0,
        "levels": CallLevels.of(corrected.levels, deployed.denoiser.timesteps, schedule),
        "measured": MEASURED,
    }
    return Sheet(maps=maps, facts=SheetFacts(**told | facts))


class MappedByHand:
    """A denoiser with the map of `made_up_sheet` written out."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def full(self, x: Tensor, step: int, cond: Any) -> tuple[Tensor, Tensor | None]:
        prediction, feature = self._denoiser.full(x, step, cond)
        return FACTOR * prediction + OFFSET, feature

    def cached(self, x: Tensor, step: int, cond: Any, feature: Tensor, **options: Any) -> Tensor:
        return FACTOR * self._denoiser.cached(x, step, cond, feature, **options) + OFFSET
