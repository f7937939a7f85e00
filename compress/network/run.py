"""One sampling run: counts the denoiser's calls, keeps the cached feature, lets a corrector look on."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from errata.compress.network.arguments import is_same_timestep, read_arguments
from errata.compress.network.branches import uncompiled
from errata.compress.network.denoiser import Denoiser
from errata.compress.network.owned_outputs import owned
from errata.compress.network.unet import BranchedUNet
from errata.compress.recipes.schedule import StepKind
from errata.errors import ArtifactMismatch


@dataclass(frozen=True)
class UNetCall:
    """One call of the denoiser inside a run, as the pipeline made it.

    `sample` is the network input `(B, C, H, W)` (scaled by the scheduler, doubled by guidance), `prediction`
    the raw network output, `feature` what the cache holds after it (None without a cache).
    """

    step: int
    kind: StepKind
    sample: Tensor
    timestep: float
    cond: Mapping[str, Tensor]
    prediction: Tensor
    feature: Tensor | None


@dataclass(frozen=True, kw_only=True)
class CallView:
    """What can be known before a denoiser call of a run is made.

    Attributes:
        step: index of the call.
        kind: how the cache schedule wants it.
        stream: which call of its sampler step it is; more than 0 only where guidance takes several calls.
        stored: `(step, feature)` of the latest full evaluations of this stream, oldest first; as many as
            `Run.remembers` at most.
        reads: steps at which the features that it will read were made, newest first; none of a full call.
    """

    step: int
    kind: StepKind
    stream: int
    stored: tuple[tuple[int, Tensor], ...]
    reads: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a denoiser call is made.

    Attributes:
        kind: full, or from a feature.
        feature: what a cached call reads, such as an extrapolated feature, to which the cache part of an
            error correction does not apply; None is the latest stored one.
        reads: the steps of the features that `feature` was made of, newest first.
    """

    kind: StepKind
    feature: Tensor | None = None
    reads: tuple[int, ...] = ()


class SteppedUNet(nn.Module):
    """Stands in a diffusers pipeline for its UNet and evaluates a `Denoiser`.

    It takes the arguments of the network that it stands for. `unet(x, timestep, …, step=None).sample` is a
    full call: an unknown timestep is an error; a repeated one means its first occurrence unless `step` is
    given. Inside a `Run` the calls are counted instead, and the cache schedule decides their kind.

    Floating-point inputs may have another precision than the network (a half-precision pipeline around
    float32 kernels): they are cast to the network's, and the prediction is cast back.

    Args:
        denoiser: what is evaluated; where it reuses the memory of its outputs, they are copied.
        config: the float network's configuration.
        module: the network inside, as a `BranchedUNet`; None where the denoiser has none.
        stands_for: class of the float network, whose arguments are taken; with a `module` it is that one's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: Any,
        *,
        module: BranchedUNet | None = None,
        stands_for: type[nn.Module] = UNet2DModel,
    ) -> None:
        super().__init__()
        self._denoiser = denoiser
        self.config = config
        self.module = module
        self.stands_for = stands_for if module is None else type(uncompiled(module.unet))
        self._signature = _signature(self.stands_for)
        self._observer: Callable[[Tensor, float, Mapping[str, Tensor]], Tensor] | None = None

    @property
    def denoiser(self) -> Denoiser:
        """What is evaluated; its outputs stay as they are."""
        return owned(self._denoiser)

    @denoiser.setter
    def denoiser(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type that the network computes in."""
        tensors = self.module.parameters() if self.module is not None else iter(())
        return next((p.dtype for p in tensors if p.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        tensors = self.module.parameters() if self.module is not None else iter(())
        return next((p.device for p in tensors), torch.device("cpu"))

    @property
    def add_embedding(self) -> SimpleNamespace:
        """The width of the added conditions, `.linear_1.in_features`, which pipelines of SDXL look up.

        Answered from the configuration, because a quantized layer need not have such an attribute.

        Raises:
            AttributeError: this network has none.
        """
        if getattr(self.config, "addition_embed_type", None) != "text_time":
            raise AttributeError("this UNet has no add_embedding of text and time")
        width = self.config.projection_class_embeddings_input_dim
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self, sample: Tensor, timestep: Tensor | float, *args: Any, step: int | None = None, **kwargs: Any
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicts for `sample` `(B, C, H, W)` at `timestep`; other arguments as in the float network.

        Raises:
            ArtifactMismatch: the timestep was not recorded, or an argument is neither tensor nor None.
            TypeError: an argument that the float network does not take, or a missing one.
        """
        call = read_arguments(self._signature, (sample, timestep, *args), kwargs)
        inner = call if self.module is None else call.to(self.dtype)
        if self._observer is not None and step is None:
            prediction = self._observer(inner.sample, call.timestep, inner.cond)
        else:
            index = self.step_of(call.timestep) if step is None else step
            prediction, _ = self.denoiser.full(inner.sample, index, inner.cond)
        if self.module is not None:
            prediction = prediction.to(sample.dtype)
        return UNet2DOutput(sample=prediction) if call.return_dict else (prediction,)

    def step_of(self, timestep: float) -> int:
        """First recorded step at that timestep.

        Raises:
            ArtifactMismatch: there is none.
        """
        recorded = self.denoiser.timesteps
        for step, time in enumerate(recorded):
            if is_same_timestep(timestep, time):
                return step
        shown = ", ".join(f"{value:g}" for value in recorded[:3])
        raise ArtifactMismatch(
            f"timestep {timestep:g} was not recorded; this model has scales for {len(recorded)} "
            f"timesteps ({shown}, …); pass step=… or sample with num_inference_steps={len(recorded)}"
        )


class Run:
    """State of one sampling run on a private copy of the pipeline.

    `pipe` shares weights with the pipeline that it was made from, but has its own scheduler and its own
    call counter, so nothing of a run (patches included) outlives it or reaches another one. Neither does a
    cached feature, which within the run belongs to a stream and to the shape, type and device of a sample.

    Args:
        count: is told the kind of every call that was made.

    Attributes:
        pipe: the diffusers pipeline to call.
        denoiser: what its calls evaluate.
        decide: says before each call how it is made; None leaves that to the cache schedule.
        kinds: how every call so far was made.
        latest: the latest calls, as many as a sampler step makes.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        denoiser: Denoiser | None = None,
        decide: Callable[[CallView], Evaluation] | None = None,
        remembers: int = 1,
        count: Callable[[StepKind], None] | None = None,
    ) -> None:
        unet = pipe.unet
        self.denoiser: Denoiser = unet.denoiser if denoiser is None else owned(denoiser)
        self.decide = decide
        self.pipe = copy.copy(pipe)
        counted = SteppedUNet(self.denoiser, unet.config, module=unet.module, stands_for=unet.stands_for)
        counted._observer = self._on_call
        self.pipe.unet = counted
        self.pipe.scheduler = copy.deepcopy(pipe.scheduler)
        self.kinds: list[StepKind] = []
        streams = self.denoiser.schedule.calls_per_step
        self.latest: deque[UNetCall] = deque(maxlen=streams)
        self._stored = [deque[tuple[int, Tensor]](maxlen=remembers) for _ in range(streams)]
        self._stored_for: list[_Place | None] = [None] * streams
        self._count = count

    def replace_features(self, features: tuple[Tensor, ...], *, step: int | None = None) -> None:
        """Puts these in the place of the latest stored features, one for each stream.

        `step` is the first call at which they were made, if it is another one.
        """
        for stream, (stored, feature) in enumerate(zip(self._stored, features, strict=True)):
            latest, _ = stored.pop()
            stored.append((latest if step is None else step + stream, feature))

    def _on_call(self, sample: Tensor, timestep: float, cond: Mapping[str, Tensor]) -> Tensor:
        step = len(self.kinds)
        self._check(step, timestep)
        schedule = self.denoiser.schedule
        stream = schedule.stream(step)
        stored = self._stored[stream]
        kind = schedule.kind(step)
        reads = (stored[-1][0],) if kind == "cached" else ()
        view = CallView(step=step, kind=kind, stream=stream, stored=tuple(stored), reads=reads)
        asked = Evaluation(kind=view.kind) if self.decide is None else self.decide(view)
        if asked.kind == "full":
            prediction, feature = self.denoiser.full(sample, step, cond)
            if feature is not None:
                stored.append((step, feature))
                self._stored_for[stream] = _place(sample)
        else:
            self._refuse_other_place(step, stream, sample)
            prediction = self._cached(sample, step, cond, asked.feature, stored)
        self.kinds.append(asked.kind)
        if self._count is not None:
            self._count(asked.kind)
        feature = stored[-1][1] if stored else None
        self.latest.append(UNetCall(step, asked.kind, sample, timestep, cond, prediction, feature))
        return prediction

    def _cached(
        self,
        sample: Tensor,
        step: int,
        cond: Mapping[str, Tensor],
        feature: Tensor | None,
        stored: deque[tuple[int, Tensor]],
    ) -> Tensor:
        origin, latest = stored[-1]
        # An error correction was fitted for the feature of a scheduled full step, and for no other.
        if feature is None and self.denoiser.schedule.kind(origin) == "full":
            return self.denoiser.cached(sample, step, cond, latest)
        used = latest if feature is None else feature
        return self.denoiser.cached(sample, step, cond, used, is_extrapolated=True)

    def _refuse_other_place(self, step: int, stream: int, sample: Tensor) -> None:
        """A feature belongs to the shape, type and device of the sample that it was made from."""
        place, here = self._stored_for[stream], _place(sample)
        if place != here:
            raise ArtifactMismatch(
                f"step {step} would read the cached feature of a sample {place}, but its own is {here}; keep "
                "shape, type and device for the whole of a run, or take an artifact without a cache"
            )

    def _check(self, step: int, timestep: float) -> None:
        recorded = self.denoiser.timesteps
        if step >= len(recorded):
            raise ArtifactMismatch(
                f"call {step + 1} of the denoiser, but only {len(recorded)} steps were recorded; "
                f"use num_inference_steps={len(recorded)} or calibrate again with more"
            )
        if not is_same_timestep(timestep, recorded[step]):
            calls = self.denoiser.schedule.calls_per_step
            hint = f", and with guidance: {calls} calls a step were recorded" if calls > 1 else ""
            raise ArtifactMismatch(
                f"step {step} is at timestep {timestep:g}, recorded was {recorded[step]:g}; "
                f"sample with the recorded scheduler and number of steps ({len(recorded)}){hint}"
            )


_Place = tuple[torch.Size, torch.dtype, torch.device]


def _place(sample: Tensor) -> _Place:
    return sample.shape, sample.dtype, sample.device


def _signature(network: type[nn.Module]) -> inspect.Signature:
    """What a network of that class takes, quantized or not."""
    signature = inspect.signature(network.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])
