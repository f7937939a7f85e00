"""What a sheet is fitted to: the float model's predictions and images, or the artifact's own full calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.correct.planner.candidates import cache_free_plan
from errata.correct.sampling import FloatSampler, Inputs, PlanSampler, Sampler
from errata.deploy import DeployedPipeline
from errata.errors import PlanError
from errata.fingerprint import model_fingerprint
from errata.runtime.schedule import StepKind
from errata.runtime.unet import BranchedUNet, in_evaluation


class Teacher(Protocol):
    """A source of right predictions.

    Attributes:
        name: as the file of a sheet calls it.
        kinds: of the evaluations that it corrects.
    """

    name: str
    kinds: tuple[StepKind, ...]

    def pair(
        self, prediction: Tensor, x: Tensor, step: int, kind: StepKind, cond: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return what the artifact and what the teacher say of a denoiser call, each `(B, C, H, W)`.

        `prediction` is what the artifact just said there.
        """

    def sampler(self, *, seed: int, inputs: Inputs) -> Sampler:
        """Return what samples the right images."""


def open_teacher(teacher: DiffusionPipeline | Literal["self"], deployed: DeployedPipeline) -> Teacher:
    """Return the teacher for an artifact.

    Raises:
        TypeError: it is neither a pipeline nor "self".
        PlanError: it is not the model that the artifact was made from; or "self" without a cache.
    """
    if isinstance(teacher, str) and teacher == "self":
        return SelfTeacher(deployed)
    if not isinstance(teacher, DiffusionPipeline) or isinstance(teacher, DeployedPipeline):
        given = repr(teacher) if isinstance(teacher, str) else f"a {type(teacher).__name__}"
        raise TypeError(f"the teacher is {given}; pass the float diffusers pipeline, or 'self'")
    return FloatTeacher(teacher, deployed)


class FloatTeacher:
    """The float model that an artifact was made from, at the artifact's calls.

    It is compared with full evaluations of the artifact, and cached ones get the same map: what quantization
    does to the mean of a prediction is nearly the same in both, and what a cache adds differs from image to
    image. A map of the cached evaluation itself did harm where a cached call recomputes little (one resnet,
    25 steps: -0.7 dB, in place of +0.6; docs/results.md).
    """

    name = "float"
    kinds: tuple[StepKind, ...] = ("full", "cached")

    def __init__(self, pipe: DiffusionPipeline, deployed: DeployedPipeline) -> None:
        expected = deployed.manifest.calibration.get("fingerprint")
        found = model_fingerprint(pipe.unet)
        if found != expected:
            raise PlanError(
                f"the teacher's UNet ({found[:12]}…) is not the one that the artifact was made from "
                f"({str(expected)[:12]}…); give the pipeline that was calibrated, in the same precision"
            )
        self._pipe, self._steps = pipe, deployed.num_inference_steps
        self._deployed = deployed
        self._timesteps = deployed.denoiser.timesteps
        self._unet = BranchedUNet(in_evaluation(pipe.unet))
        self._dtype = next(pipe.unet.parameters()).dtype

    @torch.no_grad()
    def pair(
        self, prediction: Tensor, x: Tensor, step: int, kind: StepKind, cond: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See `Teacher.pair`."""
        said = prediction if kind == "full" else self._deployed.denoiser.full(x, step, cond)[0]
        inner = {name: self._cast(value) for name, value in cond.items()}
        return said, self._unet.full(self._cast(x), self._timesteps[step], inner, branch=0)[0]

    def sampler(self, *, seed: int, inputs: Inputs) -> Sampler:
        """See `Teacher.sampler`."""
        return FloatSampler(self._pipe, num_inference_steps=self._steps, seed=seed, inputs=inputs)

    def _cast(self, value: Tensor) -> Tensor:
        value = value.to(next(self._unet.parameters()).device)
        return value.to(self._dtype) if value.is_floating_point() else value


class SelfTeacher:
    """The full calls of an artifact, for its cached ones."""

    name = "self"
    kinds: tuple[StepKind, ...] = ("cached",)

    def __init__(self, deployed: DeployedPipeline) -> None:
        if not deployed.schedule.has_cache:
            raise PlanError(
                "this artifact has no cache, so its own full calls are all that it makes; give the float "
                "pipeline as the teacher"
            )
        self._deployed = deployed

    def pair(
        self, prediction: Tensor, x: Tensor, step: int, kind: StepKind, cond: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """See `Teacher.pair`."""
        return prediction, self._deployed.denoiser.full(x, step, cond)[0]

    def sampler(self, *, seed: int, inputs: Inputs) -> Sampler:
        """See `Teacher.sampler`."""
        return PlanSampler(self._deployed, cache_free_plan(), seed=seed, inputs=inputs)
