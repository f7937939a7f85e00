"""One sampling run: counts the denoiser's calls, keeps the cached features, asks how to make each call."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from errata.errors import ArtifactMismatchError
from errata.runtime.copying_denoiser import owned
from errata.runtime.denoiser import Denoiser
from errata.runtime.schedule import StepKind
from errata.runtime.stepped_unet import SteppedUNet
from errata.runtime.unet_arguments import is_same_timestep


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
    """What is known of a denoiser call of a run before it is made.

    Attributes:
        step: index of the call.
        kind: how the cache schedule wants it.
        stream: which call of its sampler step it is; more than 0 only where guidance takes several calls.
        stored: `(step, feature)` of the latest full evaluations of this stream, oldest first; as many as
            the `remembers` of `Run` at most.
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
        """Put these in the place of the latest stored features, one for each stream.

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
            self._check_same_shape(step, stream, sample)
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

    def _check_same_shape(self, step: int, stream: int, sample: Tensor) -> None:
        """Check that a feature has the shape, type and device of the one in its place."""
        place, here = self._stored_for[stream], _place(sample)
        if place != here:
            raise ArtifactMismatchError(
                f"step {step} would read the cached feature of a sample {place}, but its own is {here}; keep "
                "shape, type and device for the whole of a run, or use an artifact without a cache"
            )

    def _check(self, step: int, timestep: float) -> None:
        recorded = self.denoiser.timesteps
        if step >= len(recorded):
            raise ArtifactMismatchError(
                f"call {step + 1} of the denoiser, but only {len(recorded)} steps were recorded; "
                f"use num_inference_steps={len(recorded)} or calibrate again with more"
            )
        if not is_same_timestep(timestep, recorded[step]):
            calls = self.denoiser.schedule.calls_per_step
            hint = f", and with guidance: {calls} calls a step were recorded" if calls > 1 else ""
            raise ArtifactMismatchError(
                f"step {step} is at timestep {timestep:g}, recorded was {recorded[step]:g}; "
                f"sample with the recorded scheduler and number of steps ({len(recorded)}){hint}"
            )


_Place = tuple[torch.Size, torch.dtype, torch.device]


def _place(sample: Tensor) -> _Place:
    return sample.shape, sample.dtype, sample.device
