"""Compare maps of the prediction: a bias, a matrix, 3x3 convolutions; and one of their own for cached calls.

    python benchmarks/output_maps.py --work runs/output_maps --steps 25
    python benchmarks/output_maps.py --work runs/output_maps --steps 50 --pipeline runs/horses
    python benchmarks/output_maps.py --work runs/output_maps --steps 25 --recipes w4a8 --distances 1000

All are fitted to the same recorded trajectories, as `errata compress` fits a calibrated output, and judged by
PSNR to the float model's images from other noise, in pairs: the mean of the differences to the artifact
without a map, with its 95 % interval. This is what the choice of one matrix a call, for full and cached calls
alike, rests on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import DiffusionPipeline
from sheets import (
    MEASURED,
    add_distances,
    artifact_for,
    common_parser,
    distance,
    opened,
    sampled,
    uncalibrated,
)
from torch import Tensor
from torch.nn import functional

from errata import calibration
from errata.calibration import CalibrationSet
from errata.correct import Forecast, Plan
from errata.correct.sampling import PlanSampler, default_inputs
from errata.deploy import DeployedPipeline
from errata.quality.intervals import mean_estimate
from errata.quality.paired import psnr
from errata.quality.reference import Reference
from errata.runtime.denoiser import Conditioning, Denoiser, WrappedDenoiser
from errata.runtime.output_map import mapped
from errata.runtime.output_moments import OutputMoments
from errata.runtime.schedule import StepKind

RECIPES = ("w8a8", "w4a8", "w8a8+deepcache-10", "w8a8+deepcache-10:branch=1", "w8a8+cachequant-10")
# Of the 3x3 convolution, relative to the mean of the diagonal: the best of 1e-4 to 1e-1 on the digits model.
RIDGE = 1e-3
# From the prediction, the sample, the call and its kind to the corrected prediction.
Correction = Callable[[Tensor, Tensor, int, StepKind], Tensor]


@dataclass
class Convolution:
    """Weighted least squares for a 3x3 convolution with a bias, for each call: of the prediction, or of both.

    Attributes:
        reads_sample: whether the sample is convolved as well.
    """

    reads_sample: bool
    _sums: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def _read(self, prediction: Tensor, sample: Tensor) -> Tensor:
        return torch.cat([prediction, sample], dim=1) if self.reads_sample else prediction

    def add(self, call: int, prediction: Tensor, sample: Tensor, target: Tensor) -> None:
        """Add pairs `(B, C, H, W)`, weighted as `OutputMoments` weighs them."""
        delta = (target - prediction).double().flatten(2)
        error = delta.square().mean(dim=(1, 2))
        patches = functional.unfold(self._read(prediction, sample).double(), 3, padding=1)
        z = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
        weighted = z / (error + error.median()).clamp(min=1e-20)[:, None, None]
        gram, cross = (weighted @ z.mT).sum(0), (weighted @ delta.mT).sum(0)
        before = self._sums.get(call, (torch.zeros_like(gram), torch.zeros_like(cross)))
        self._sums[call] = (before[0] + gram, before[1] + cross)

    def correction(self) -> Correction:
        """Return what applies it."""
        solved = {}
        for call, (gram, cross) in self._sums.items():
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            theta = torch.linalg.solve(gram + ridge, cross).float()
            solved[call] = (theta[:-1].T.reshape(theta.shape[1], -1, 3, 3), theta[-1])

        def apply(prediction: Tensor, sample: Tensor, step: int, kind: StepKind) -> Tensor:
            weight, bias = solved[step]
            return prediction + functional.conv2d(self._read(prediction, sample), weight, bias, padding=1)

        return apply


class Corrected(WrappedDenoiser):
    """A denoiser whose predictions are corrected."""

    def __init__(self, denoiser: Denoiser, correction: Correction) -> None:
        super().__init__(denoiser)
        self._correction = correction

    def corrected(
        self, prediction: Tensor, x: Tensor, step: int, kind: StepKind, cond: Conditioning
    ) -> Tensor:
        """Return the corrected prediction."""
        return self._correction(prediction, x, step, kind)


@torch.no_grad()
def fitted(deployed: DeployedPipeline, unet: torch.nn.Module, given: CalibrationSet) -> dict[str, Correction]:
    """Return the corrections to compare, by name."""
    calls, channels = deployed.schedule.num_steps, int(unet.config.out_channels)  # type: ignore[union-attr,arg-type]
    full, cached = (OutputMoments(calls, channels) for _ in range(2))
    convolutions = {
        "3x3": Convolution(reads_sample=False),
        "3x3 of prediction and sample": Convolution(reads_sample=True),
    }
    first = 0
    for records in zip(*(given.batches(step) for step in range(calls)), strict=True):
        images, feature = torch.arange(len(records[0].sample)) + first, None
        for step, record in enumerate(records):
            right = unet(record.sample, record.timestep).sample
            prediction, found = deployed.denoiser.full(record.sample, step, {})
            full.add(step, prediction, right, images)
            for convolution in convolutions.values():
                convolution.add(step, prediction, record.sample, right)
            if step in deployed.schedule.full_steps:
                feature = None if found is None else found.clone()
            elif feature is not None:
                reused = deployed.denoiser.cached(record.sample, step, {}, feature)
                cached.add(step, reused, right, images)
        first += len(images)
    corrections = {
        "bias": _mapping(full, full, bias_only=True),
        "matrix": _mapping(full, full),
        **{name: convolution.correction() for name, convolution in convolutions.items()},
    }
    if deployed.schedule.has_cache:
        corrections["matrix, cached calls with their own"] = _mapping(full, cached)
    return corrections


def _mapping(full: OutputMoments, cached: OutputMoments, *, bias_only: bool = False) -> Correction:
    maps = {"full": full.maps(bias_only=bias_only), "cached": cached.maps(bias_only=bias_only)}

    def apply(prediction: Tensor, sample: Tensor, step: int, kind: StepKind) -> Tensor:
        return mapped(prediction, maps[kind].matrix[step], maps[kind].bias[step])

    return apply


def measure(
    pipe: DiffusionPipeline,
    deployed: DeployedPipeline,
    given: CalibrationSet,
    floats: Tensor,
    options: argparse.Namespace,
) -> None:
    """Print all rows of an artifact."""
    corrections = fitted(deployed, pipe.unet, given)
    plans = {"none": Plan.none()}
    if deployed.schedule.has_cache:
        plans["forecast"] = Plan(Forecast())
    for name, plan in plans.items():
        plain, told = values(deployed, plan, floats, options)
        label = f"{deployed.manifest.recipe.name.removesuffix(':calibrated_output=false'):28} {name:9}"
        print(f"{label} {'without':36} {float(plain.mean()):6.2f} dB{told}", flush=True)
        for kind, correction in corrections.items():
            inner = deployed.clone()
            inner.pipe.unet.denoiser = Corrected(inner.denoiser, correction)
            found, told = values(inner, plan, floats, options)
            change = mean_estimate(found - plain)
            print(
                f"{label} {kind:36} {float(found.mean()):6.2f} dB  {change.value:+5.2f} "
                f"({change.interval.low:+.2f} to {change.interval.high:+.2f}){told}",
                flush=True,
            )


def values(
    deployed: DeployedPipeline, plan: Plan, floats: Tensor, options: argparse.Namespace
) -> tuple[Tensor, str]:
    """Return PSNR of each image, dB, and the Fréchet distance in words, if it is asked for."""
    sampler = PlanSampler(deployed, plan, seed=MEASURED, inputs=default_inputs)
    images = sampled(sampler, len(floats))
    told = f"  FD {distance(images, Reference.embedded()):.3f}" if options.distances else ""
    return psnr(images[: options.samples], floats[: options.samples]), told


def main() -> None:
    """Run the benchmark."""
    parser = common_parser(__doc__, steps=25, recipes=RECIPES)
    add_distances(parser)
    options = parser.parse_args()
    pipe, floats = opened(options, options.pipeline)
    for recipe in options.recipes:
        deployed = artifact_for(pipe, options, uncalibrated(recipe))
        given = calibration.load(options.work / f"steps-{options.steps}" / "calibration")
        measure(pipe, deployed, given, floats, options)


if __name__ == "__main__":
    main()
