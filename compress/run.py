"""One sampling run: counts the denoiser's calls, keeps the cached feature, lets a corrector look on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from errata.compress.denoiser import Denoiser
from errata.compress.schedule import StepKind
from errata.errors import ArtifactMismatch


@dataclass(frozen=True)
class UNetCall:
    """One call of the denoiser inside a run, as the pipeline made it.

    `sample` is the network input `(B, C, H, W)` (scaled by the scheduler, doubled by guidance), `prediction`
    the raw network output, `feature` what a full call left in the cache.
    """

    step: int
    kind: StepKind
    sample: Tensor
    timestep: float
    cond: Mapping[str, Tensor]
    prediction: Tensor
    feature: Tensor | None


class SteppedUNet(nn.Module):
    """Stands in a diffusers pipeline for its UNet and evaluates a `Denoiser`.

    `unet(x, timestep, step=None).sample` is a full call. An unknown timestep is an error; a repeated one
    means its first occurrence unless `step` is given. Inside a `Run` the calls are counted instead, and the
    cache schedule decides their kind.
    """

    def __init__(self, denoiser: Denoiser, config: Any, *, module: nn.Module | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = config
        self.module = module
        self._observer: Callable[[Tensor, float, Mapping[str, Tensor]], Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of inputs and outputs."""
        tensors = self.module.parameters() if self.module is not None else iter(())
        return next((p.dtype for p in tensors if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        tensors = self.module.parameters() if self.module is not None else iter(())
        return next((p.device for p in tensors), torch.device("cpu"))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        *,
        step: int | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicts for `sample` `(B, C, H, W)` at `timestep`, like `UNet2DModel.forward`.

        Raises:
            ArtifactMismatch: the timestep was not recorded.
        """
        time = _one_timestep(timestep)
        cond = {} if class_labels is None else {"class_labels": class_labels}
        if self._observer is not None and step is None:
            prediction = self._observer(sample, time, cond)
        else:
            index = self.step_of(time) if step is None else step
            prediction, _ = self.denoiser.full(sample, index, cond)
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)

    def step_of(self, timestep: float) -> int:
        """First recorded step at that timestep.

        Raises:
            ArtifactMismatch: there is none.
        """
        recorded = self.denoiser.timesteps
        if timestep not in recorded:
            shown = ", ".join(f"{value:g}" for value in recorded[:3])
            raise ArtifactMismatch(
                f"timestep {timestep:g} was not recorded; this model has scales for {len(recorded)} "
                f"timesteps ({shown}, …); pass step=… or sample with num_inference_steps={len(recorded)}"
            )
        return recorded.index(timestep)


class Run:
    """State of one sampling run on a private copy of the pipeline.

    `pipe` shares weights with the pipeline that it was made from, but has its own scheduler and its own
    call counter, so nothing of a run (patches included) outlives it or reaches another one.

    Attributes:
        pipe: the diffusers pipeline to call.
        last: the latest denoiser call.
        feature: what the next cached step will read; a corrector may replace it.
        kinds: kind of every call so far.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        unet = pipe.unet
        self.denoiser: Denoiser = unet.denoiser
        self.pipe = copy.copy(pipe)
        counted = SteppedUNet(unet.denoiser, unet.config, module=unet.module)
        counted._observer = self._on_call
        self.pipe.unet = counted
        self.pipe.scheduler = copy.deepcopy(pipe.scheduler)
        self.last: UNetCall | None = None
        self.feature: Tensor | None = None
        self.kinds: list[StepKind] = []

    def _on_call(self, sample: Tensor, timestep: float, cond: Mapping[str, Tensor]) -> Tensor:
        step = len(self.kinds)
        self._check(step, timestep)
        kind = self.denoiser.schedule.kind(step)
        if kind == "full":
            prediction, self.feature = self.denoiser.full(sample, step, cond)
        else:
            assert self.feature is not None  # step 0 is always full
            prediction = self.denoiser.cached(sample, step, cond, self.feature)
        self.kinds.append(kind)
        self.last = UNetCall(step, kind, sample, timestep, cond, prediction, self.feature)
        return prediction

    def _check(self, step: int, timestep: float) -> None:
        recorded = self.denoiser.timesteps
        if step >= len(recorded):
            raise ArtifactMismatch(
                f"call {step + 1} of the denoiser, but only {len(recorded)} steps were recorded; "
                f"use num_inference_steps={len(recorded)} or calibrate again with more"
            )
        if timestep != recorded[step]:
            raise ArtifactMismatch(
                f"step {step} is at timestep {timestep:g}, recorded was {recorded[step]:g}; "
                f"sample with the recorded scheduler and number of steps ({len(recorded)})"
            )


def _one_timestep(timestep: Tensor | float) -> float:
    times = torch.as_tensor(timestep).flatten()
    if len(times) == 0 or not bool((times == times[0]).all()):
        raise ArtifactMismatch(
            f"the rows of a batch are at different timesteps ({times.tolist()[:3]}, …); activation scales "
            "are one per step, so call once for each timestep"
        )
    return float(times[0])
