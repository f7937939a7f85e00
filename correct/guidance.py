"""How a pipeline gets from samples to the network's input, and from its output to the scheduler's prediction.

A pipeline does not say what it does there, so it is recognised from what it did: the network's inputs and
outputs of one sampling step, and what the scheduler was given. A rule is accepted only if it reproduces that;
if none does, it is an error.

The known rules are: no guidance; classifier-free guidance in one doubled batch or in two calls, with
`guidance_rescale` or without; further input channels (an image to enlarge); an output with one more channel
and the preconditioning of the latent upscaler.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.correct.corrector import Rows, take
from errata.correct.latent_upscaler import Read, reader_of
from errata.errors import PlanError
from errata.runtime.run import UNetCall

# Rounding to nearest changes a value by at most eps / 2 of it, and by eps / sqrt(12) as a root mean square if
# the errors are uniform. Twice that is allowed.
_ROUNDING = 2 / math.sqrt(12)
# Guidance in another order, as s c + (1 - s) u, rounds larger values. The error may be this part of the
# prediction. bfloat16 would need more, but then another order could not be told from another rule.
_OTHER_ORDER = 0.005
# No single value may be off by more than this many roundings of the largest value.
_MOST_ROUNDINGS = 64

Combine = Callable[[Sequence[Tensor]], Tensor]
"""Makes the prediction `(B, …)` of its parts, each `(B, …)`."""


@dataclass(frozen=True)
class Guidance:
    """What a pipeline does around the network at one sampling step.

    Attributes:
        step: the (first) denoiser call of the sampling step at which it was recognised.
        copies: how often each sample is in the batch of one call.
        is_guided: whether the prediction is made of several parts.
        combine: makes the prediction of its parts: of all calls in order, and of each call's copies in order.
        read: makes a part from the network's output for it, the unscaled samples, and the index of the
            denoiser call.
        scale: of the guidance, as recognised; None without.
    """

    step: int
    copies: int
    is_guided: bool
    combine: Combine
    read: Read
    scale: float | None = None

    def expand(self, scaled: Tensor, rows: Rows, call: UNetCall) -> Tensor:
        """Return the network's input for scaled samples `(rows, …)`; further channels of `call` are kept."""
        x = torch.cat([scaled] * self.copies).to(call.sample.dtype)
        channels = scaled.shape[1]
        if call.sample.shape[1] == channels:
            return x
        return torch.cat([x, take(call.sample[:, channels:], self.network_rows(rows, call))], dim=1)

    def conditioning(self, rows: Rows, call: UNetCall) -> dict[str, Tensor]:
        """Return the network's other arguments for these samples; those without an entry per row are kept."""
        network_rows, batch_size = self.network_rows(rows, call), call.sample.shape[0]
        return {
            name: take(value, network_rows) if value.ndim and value.shape[0] == batch_size else value
            for name, value in call.cond.items()
        }

    def network_rows(self, rows: Rows, call: UNetCall) -> Rows:
        """Return the rows of the network's batch that belong to these samples."""
        if rows is None or self.copies == 1:
            return rows
        batch_size = call.sample.shape[0] // self.copies
        return torch.cat([rows + copy * batch_size for copy in range(self.copies)])

    def prediction(self, raws: Sequence[Tensor], samples: Tensor, *, step: int | None = None) -> Tensor:
        """Return the guided prediction `(rows, …)` of the network's outputs, one for each call.

        `step` is the first of the denoiser calls that were made; None is the one of this sampling step.
        """
        made_at = self.step if step is None else step
        parts = [part for raw in raws for part in raw.chunk(self.copies)]
        return self.combine([self.read(part, samples, made_at) for part in parts])


@dataclass(frozen=True)
class _Found:
    """What reproduced a step: the scale, whether the pipeline states it, and whether it rescales."""

    scale: float
    is_stated: bool
    rescales: bool


class Recogniser:
    """Recognises the guidance of a run, step by step.

    Args:
        pipe: the run's pipeline, for its class, `guidance_scale` and `guidance_rescale`, where it has them.
        asked: the scale that it was called with, if it takes one.
    """

    def __init__(self, pipe: Any, *, asked: float | None = None) -> None:
        self._pipe, self._asked = pipe, asked
        self._found: _Found | None = None

    def recognise(
        self,
        calls: Sequence[UNetCall],
        model_output: Tensor,
        sample: Tensor,
        scaled_sample: Tensor,
        *,
        compares_values: bool = True,
    ) -> Guidance:
        """Return the guidance that reproduces what the pipeline did at this step.

        `model_output` and `sample` are what the scheduler was given, `scaled_sample` what it makes of the
        sample for the network. Shapes are always compared. Comparing values waits for the device.

        Raises:
            PlanError: no known guidance does.
        """
        step, copies = calls[0].step, _copies(calls, sample)
        if compares_values:
            _check_inputs(calls, scaled_sample, copies)
        read = reader_of(self._pipe)
        parts = [read(part, sample, step) for call in calls for part in call.prediction.chunk(copies)]
        if not parts[0].shape == model_output.shape == sample.shape:
            raise PlanError(
                f"step {step}: the network returned {_shape(parts[0])}, the scheduler was given "
                f"{_shape(model_output)} for a sample {_shape(sample)}; learned variances cannot be "
                "corrected: sample without correction"
            )
        if len(parts) == 1:
            if compares_values and not _close(parts[0], model_output):
                raise _unknown(step)
            return Guidance(step, copies, False, _only, read)
        if len(parts) > 2:
            raise PlanError(
                f"step {step}: the prediction is made of {len(parts)} parts; only guidance with two is "
                "known: sample without this guidance, or without correction"
            )
        scale, combine = self._guided(step, parts, model_output, compares_values=compares_values)
        return Guidance(step, copies, True, combine, read, scale)

    def _guided(
        self, step: int, parts: Sequence[Tensor], target: Tensor, *, compares_values: bool
    ) -> tuple[float, Combine]:
        stated = _number(getattr(self._pipe, "guidance_scale", None))
        rescale = _number(getattr(self._pipe, "guidance_rescale", None)) or 0.0
        found = self._found
        if found is not None and not compares_values:
            scale = stated if found.is_stated and stated is not None else found.scale
            return scale, _classifier_free(scale, rescale if found.rescales else 0.0)
        known = (stated, None if found is None else found.scale, self._asked)
        scales = [scale for scale in known if scale is not None]
        for phi in (rescale, 0.0) if rescale else (0.0,):
            # A pipeline or call need not state the scale, but diffusers' pipelines that rescale do.
            for scale in scales if phi else (*scales, *_fits(parts, target)):
                if _explains(scale, phi, parts, target):
                    self._found = _Found(scale, is_stated=scale == stated, rescales=phi != 0.0)
                    return scale, _classifier_free(scale, phi)
        raise _unknown(step)


def asked_scale(pipe: Any, arguments: Mapping[str, Any]) -> float | None:
    """Return the guidance scale of a call with these arguments, or its default; None if there is none."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return _number(arguments.get("guidance_scale", None if parameter is None else parameter.default))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _only(parts: Sequence[Tensor]) -> Tensor:
    return parts[0]


def _classifier_free(scale: float, rescale: float) -> Combine:
    """Return `first + scale (second - first)`, with its spread brought towards that of `second` by `rescale`.

    Source: Ho and Salimans (2022), Eq. 6; Lin et al., "Common diffusion noise schedules and sample steps are
    flawed" (2023), section 3.4.
    """

    def combine(parts: Sequence[Tensor]) -> Tensor:
        first, second = parts
        guided = first + scale * (second - first)
        if rescale == 0.0:
            return guided
        axes = list(range(1, guided.ndim))
        spread = second.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
        return rescale * (guided * spread) + (1 - rescale) * guided

    return combine


def _fits(parts: Sequence[Tensor], target: Tensor) -> list[float]:
    """Return the scale that explains the prediction best, rounded and exact; wait for the device."""
    first, second, wanted = (tensor.double() for tensor in (*parts, target))
    difference = second - first
    size = float(difference.square().sum())
    if size == 0.0:  # nothing to tell it from
        return [1.0]
    scale = float(((wanted - first) * difference).sum()) / size
    return [float(f"{scale:.4g}"), scale]


def _copies(calls: Sequence[UNetCall], sample: Tensor) -> int:
    rows, batch_size = calls[0].sample.shape[0], sample.shape[0]
    if rows % batch_size or any(call.sample.shape != calls[0].sample.shape for call in calls):
        raise PlanError(
            f"step {calls[0].step}: the network was called with {_shape(calls[0].sample)} for a sample "
            f"{_shape(sample)}; such a pipeline cannot be corrected: sample without correction"
        )
    return rows // batch_size


def _check_inputs(calls: Sequence[UNetCall], scaled: Tensor, copies: int) -> None:
    for call in calls:
        seen = call.sample[:, : scaled.shape[1]]
        if seen.shape[1:] != scaled.shape[1:] or not _close(torch.cat([scaled] * copies), seen):
            raise PlanError(
                f"step {call.step}: the network's input is not the scheduler's sample, scaled by it; such a "
                "pipeline cannot be corrected: sample without correction"
            )


def _explains(scale: float, rescale: float, parts: Sequence[Tensor], target: Tensor) -> bool:
    """Return whether guiding `parts` gives `target`, except for rounding, which is bounded image by image.

    With u, c the parts, d = c - u, g = u + s d, and every operation rounded once, the errors of d, of s d and
    of g add up to a variance of (2 (s d)² + g²) eps² / 12. In another order u, s u and s c are rounded.
    """
    eps = _eps(target, *parts)
    # A pipeline may round the parts to the type of the prediction before it guides them, or guide them first.
    for seen in (parts, [part.to(target.dtype) for part in parts]):
        first, second = (part.double() for part in seen)
        along = scale * (second - first)
        guided = _classifier_free(scale, rescale)([first, second])
        direct = _ROUNDING * eps * (2 * _mean_square(along) + _mean_square(first + along)).sqrt()
        summed = _mean_square(first) + scale**2 * (_mean_square(first) + _mean_square(second))
        other = (_ROUNDING * eps * summed.sqrt()).minimum(_OTHER_ORDER * _mean_square(guided).sqrt())
        # The three standard deviations and quotients of a rescaling are rounded once for all of an image.
        spread = 1.5 * eps * _mean_square(guided).sqrt() if rescale else 0.0
        if _differs_by_rounding(guided, target, direct.maximum(other) + spread, eps):
            return True
    return False


def _close(expected: Tensor, given: Tensor) -> bool:
    """Return whether two batches are the same except for a rounding or two, image by image."""
    eps = _eps(expected, given)
    bound = 2 * _ROUNDING * eps * _mean_square(expected).sqrt()
    return expected.shape == given.shape and _differs_by_rounding(expected, given, bound, eps)


def _differs_by_rounding(expected: Tensor, given: Tensor, bound: Tensor, eps: float) -> bool:
    """Return whether each image differs by at most `bound` `(B,)` in root mean square, no value by much more.

    NaN and infinities are equal if both have them.
    """
    rounded = expected.to(given.dtype)  # a value that is too large for the type is infinite in both
    if not torch.equal(rounded.isfinite(), given.isfinite()):
        return False
    wide, seen = (_finite(tensor) for tensor in (expected.where(given.isfinite(), 0), given))
    difference = wide - seen
    most = _MOST_ROUNDINGS * eps * seen.abs().max()
    return bool((_mean_square(difference).sqrt() <= bound).all() and (difference.abs() <= most).all())


def _mean_square(batch: Tensor) -> Tensor:
    """Return the mean square of each image of `(B, …)`, `(B,)`, without NaN and infinities."""
    return _finite(batch).square().flatten(1).mean(dim=1)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.double().nan_to_num(0.0, 0.0, 0.0)


def _eps(*tensors: Tensor) -> float:
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)


def _unknown(step: int) -> PlanError:
    return PlanError(
        f"step {step}: the pipeline changed the network's prediction before it stepped, in a way that is "
        "neither classifier-free guidance nor its rescaling; such a pipeline cannot be corrected: sample "
        "without correction"
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(str(size) for size in tensor.shape)
